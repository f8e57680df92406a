"""The logits of all tokens of a sequence, also of a model that has outputs for the last tokens only.

Shapes: B batch, T tokens, L outputs of a sequence.

Such a model reads the sequence up to token L, up to token 2L, …, each from its start, and each time the last
L outputs are taken. The output of a token then depends on the same tokens as in any other model.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bench.model.language_model import LanguageModel, Output


def every_output(
    model: LanguageModel, tokens: Tensor, *, causal: bool, first: int = 0
) -> Iterator[tuple[slice, Output]]:
    """Run the model on sequences (B, T); yields slices of T, each with the Output of its tokens. The logits
    of tokens before `first` are not needed, and may be left out.

    Raises ValueError for an input without a token.
    """
    length = tokens.shape[1]
    count = model.depth_schedule.outputs(length)
    if count == length:
        yield from model.stream(tokens, causal=causal)
        return
    for start in range(0, length, count):
        stop = min(start + count, length)
        if stop > first:
            out = model(tokens[:, :stop], causal=causal)
            yield slice(start, stop), out._replace(logits=out.logits[:, start - stop :])
