"""Early exit: a token stops where its prediction is settled, and goes through no further visits.

Shapes: B batch, T tokens, C channels, V vocabulary, N visits.

After each visit but the last, the model's own last norm and output layer predict the next token from the
hidden state. Two rules say whether the token exits there:

    confidence  the largest probability exceeds the second largest by more than `threshold`
                (CALM, Schuster et al. 2022, arXiv:2207.07061: the softmax response)
    patience    the most likely token was the same after the last `patience` visits as before them
                (PABEE, Zhou et al. 2020, arXiv:2006.04152)

The state of a token that has exited is copied to all later visits, which compute keys and values from it, as
CALM does; other tokens attend to these. So every visit is computed for every token, here and in decoding:
what a token needs is counted, not saved. Saving it in decoding would take mixers that append keys and values
without attending.

Training knows no exits. It makes all visits, and the loss is the mean of the losses after each of them. That
after visit i has the weight i / (1 + … + N), as in both papers. So the rule and its knobs only matter in
evaluation and decoding. The exits are trained one by one, and their logits are computed twice: the peak
memory has those of one exit.

Deviations. CALM exits at a difference of at least the threshold; here it must be larger, so that none exits
with 1. CALM's threshold may decay with the position, and it calibrates the threshold for a bound of the
quality; here it is a knob. PABEE has a classifier for each layer, and a whole sequence exits; here all exits
share the output layer, as CALM's do, and each token exits by itself.

A path that runs visits one by one leaves `activations=sqrt` groups of one visit: it is then `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from variants.base import Context, DepthConfig, DepthSchedule, Dims, Path, PathOut, RunVisits
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig(DepthConfig):
    """When a token exits."""

    rule: Literal["confidence", "patience"] = "confidence"
    """What settles a prediction. confidence: the difference of the two largest probabilities. patience: that
    the most likely token stays the same."""
    threshold: float = knob(0.9, least=0, most=1)
    """Difference of the two largest probabilities above which a token exits; 1 is a stack. Only for
    rule=confidence."""
    patience: int = knob(2, least=1, unit="visits")
    """Visits in a row that must leave the most likely token as it is. With depth − 1 or more no token exits.
    Only for rule=patience."""


class ExitPath(Path):
    """All visits, one by one; the hidden state of a token that has exited stays as it is."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """See `Path`. In training no token exits."""
        return self._for_training(x, places, run) if self.training else self._with_exits(x, places, run)

    def _for_training(self, x: Tensor, places: Sequence[int], run: RunVisits) -> PathOut:
        exits = []
        for place in places:
            x = run([place], x)
            exits.append(x)
        return PathOut(x, exits=tuple(exits[:-1]))

    def _with_exits(self, x: Tensor, places: Sequence[int], run: RunVisits) -> PathOut:
        rule = _Confidence(self.config) if self.config.rule == "confidence" else _Patience(self.config)
        exited = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        visits = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        for place in places:
            x = torch.where(exited[..., None], x, run([place], x))
            visits += ~exited
            if place != places[-1]:
                exited = exited | rule.settled(run.read_out(x))
        return PathOut(x, visits=visits)


class _Confidence:
    def __init__(self, config: EarlyExitConfig) -> None:
        self.threshold = config.threshold

    def settled(self, logits: Tensor) -> Tensor:
        """(B, T, V) → (B, T) bool. Sums are float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        total = logits.logsumexp(-1)
        settled: Tensor = (first - total).exp() - (second - total).exp() > self.threshold
        # an exponential may round to more than 1, but no difference of probabilities is
        return settled if self.threshold < 1 else torch.zeros_like(settled)


class _Patience:
    def __init__(self, config: EarlyExitConfig) -> None:
        self.patience = config.patience
        self.before: Tensor | None = None
        self.unchanged: Tensor | None = None

    def settled(self, logits: Tensor) -> Tensor:
        """(B, T, V) after the next visit → (B, T) bool."""
        predicted = logits.argmax(-1)
        if self.before is None or self.unchanged is None:
            self.unchanged = torch.zeros_like(predicted)
        else:
            self.unchanged = torch.where(predicted == self.before, self.unchanged + 1, 0)
        self.before = predicted
        return self.unchanged >= self.patience


class EarlyExit(DepthSchedule):
    """Blocks 0, 1, …, depth − 1, of which each token needs as many as its prediction takes."""

    Config = EarlyExitConfig
    config: EarlyExitConfig
    paper = (
        "Schuster et al. 2022, Confident Adaptive Language Modeling, arXiv:2207.07061; "
        "Zhou et al. 2020, BERT Loses Patience, arXiv:2006.04152"
    )

    @classmethod
    def unsupported(cls, config: Any, *, depth: int, activations: str) -> str | None:
        """A reversible network has no single hidden state between visits."""
        if activations == "reversible" and depth > 1:
            return (
                "its two streams are one only after the last visit, and the model's output is read after "
                "every visit; allowed are all other strategies"
            )
        return None

    def visits(self) -> Sequence[int]:
        """Each once."""
        return range(self.depth)

    def exit_weights(self) -> Sequence[float]:
        """i / (1 + … + N) for visit i of N."""
        total = self.depth * (self.depth + 1) // 2
        return [visit / total for visit in range(1, self.depth)]

    def path(self, dims: Dims) -> Path:
        """With exits, which have no parameters."""
        return ExitPath(self.config)
