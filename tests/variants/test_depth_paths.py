"""What a model makes of a schedule with a path of its own: one that halves the length between its visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import variants
from bench.measure.flops import CountFlops
from bench.model.activations import STRATEGIES
from bench.model.decode import no_decoding
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from bench.train.step import optimizer_for, training_step
from variants.base import (
    Context,
    Cost,
    DepthConfig,
    DepthSchedule,
    Dims,
    Path,
    PathOut,
    RunVisits,
    SlotSpec,
    Workload,
)

T, VOCABULARY, SIZES = 24, 11, Dims(seq_len=24, d_model=16, heads=2)


@dataclass(frozen=True, kw_only=True)
class HalvesConfig(DepthConfig):
    """No knobs."""


class HalvesPath(Path):
    """The first visit on all tokens, the others on means of two, and a scale that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        first, *others = places
        x = run([first], x)
        pooled = run(others, x.unflatten(1, (-1, 2)).mean(2))
        return PathOut(x + self.scale * pooled.repeat_interleave(2, dim=1), (self.scale.square(),))

    def cost(self, work: Workload) -> Cost:
        return Cost({"path": 5 * work.seq_len})


class Halves(DepthSchedule):
    """See `HalvesPath`."""

    Config, paper = HalvesConfig, "nobody"

    def visits(self) -> Sequence[int]:
        return range(self.depth)

    def path(self, dims: Dims) -> Path:
        return HalvesPath()

    def lengths(self, seq_len: int) -> Sequence[int]:
        return [seq_len, *[seq_len // 2] * (self.depth - 1)]

    @classmethod
    def no_decoding(cls, config: object) -> str | None:
        return "reads two tokens at once"


def model_of(activations: str = "keep") -> LanguageModel:
    torch.manual_seed(0)
    dense = variants.load("dense")
    spec = ModelSpec.of(dense, dense.Config(impl="naive"), feed_forward=feed_forward(mult=2))
    spec = replace(spec, depth=SlotSpec("halves", Halves, HalvesConfig()))
    sizes = {"depth": 3, "dropout": 0.1, "vocabulary": VOCABULARY}
    return LanguageModel(spec, SIZES, activations=activations, **sizes)  # type: ignore[arg-type]


def ids(seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activations", ["checkpoint", "sqrt", "selective"])
def test_gradients_are_those_of_stored_activations(activations: str) -> None:
    def gradients(model: LanguageModel) -> dict[str, Tensor]:
        torch.manual_seed(1)
        training_step(model.train(), optimizer_for(model, 0.0), Batch(ids(0), ids(1)), causal=False)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = model_of(activations)
    got = gradients(model)
    with model.running(STRATEGIES["keep"].run):
        want = gradients(model)
    assert [*got] == [name for name, _ in model.named_parameters()]
    assert "path.scale" in got
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad)


def test_the_auxiliary_loss_of_a_path_is_one_of_the_model() -> None:
    out = model_of()(ids(0), causal=False)
    assert [loss.detach().item() for loss in out.aux_losses] == [1.0]


def test_flops_are_those_of_the_lengths() -> None:
    model = model_of().eval()
    work = Workload(batch_size=2, seq_len=T, d_model=16, heads=2, causal=False)
    with CountFlops() as counter, torch.no_grad():
        model(ids(0), causal=False)
    assert counter.total == model.cost(work).total - 5 * T
    block, output = model.blocks[0], 2 * 2 * T * 16 * VOCABULARY
    half = replace(work, seq_len=T // 2)
    visits = [block.mixer.cost(each) + block.feed_forward.cost(each) for each in (work, half, half)]
    assert counter.total == sum(each.total for each in visits) + output


def test_layers_are_built_for_the_lengths_of_their_visits() -> None:
    assert [layer.dims.seq_len for layer in model_of().layers] == [T, T // 2, T // 2]


def test_a_path_over_several_tokens_is_not_decoded() -> None:
    assert no_decoding(model_of()) == "stack=halves reads two tokens at once"
