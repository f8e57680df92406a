"""Variants that are wrong in one way each: the gate meant for it stops them, and a right one passes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import variants
from bench.config.spec import CellSpec, DataSpec, MeasureSpec, ModelSizes
from bench.measure import gates, recompute_gate
from bench.measure.flops import CountFlops
from bench.measure.gates import COST_LIMIT, GateFailed, cost_ratio, leak, reference_error
from bench.model import reversible
from variants.attention.dense import Dense, naive
from variants.base import Context, Cost, Impl, MixerOut, Workload
from variants.ops.patterns import masks
from variants.ops.projections import masked_attention

CPU = torch.device("cpu")
COST = Cost({"projections": 100, "attention": 1000})
DIMS = Workload(causal=True, batch_size=2, seq_len=70, d_model=32, heads=2)


class MaskOff(Dense):
    """Reads one token ahead: j ≤ i + 1."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        allowed = masks.matrix(lambda _, i, j: j <= i + 1, x.shape[1])
        return MixerOut(self.projections.merge(masked_attention(q, k, v, allowed)))


class SelectsAhead(Dense):
    """Keeps keys whose norm is over half of the sequence's largest: only the selection sees the future."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        norms = k.norm(dim=-1)  # (B, H, T)
        chosen = norms > 0.7 * norms.amax(dim=-1, keepdim=True)
        itself = torch.eye(x.shape[1], dtype=torch.bool)
        allowed = masks.matrix(masks.causal, x.shape[1]) & chosen[:, :, None, :] | itself
        return MixerOut(self.projections.merge(masked_attention(q, k, v, allowed)))


class ReadsItsBlock(Dense):
    """Reads to the end of its block of 16 tokens: no cut at the end of a block shows it."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        allowed = masks.matrix(lambda _, i, j: j <= i // 16 * 16 + 15, x.shape[1])
        return MixerOut(self.projections.merge(masked_attention(q, k, v, allowed)))


class ReadsPastItsBlock(Dense):
    """The last token of a block of 16 reads the next: no cut but at the end of a block shows it."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        allowed = masks.matrix(lambda _, i, j: (j <= i) | ((j == i + 1) & (j % 16 == 0)), x.shape[1])
        return MixerOut(self.projections.merge(masked_attention(q, k, v, allowed)))


class Saturates(Dense):
    """Scaled by the largest entry of the sequence once it is over 8, as a guard against overflow is."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        out = super().forward(x, ctx)
        return MixerOut(out.y / (x.abs().amax(dim=(1, 2), keepdim=True) / 8).clamp(min=1))


class Faint(Dense):
    """Adds a ten-thousandth of what the last token says to every output: over rounding, under notice."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        y = super().forward(x, ctx).y
        return MixerOut(y + 1e-4 * x[:, -1:].tanh())


class Second(Dense):
    """Reads ahead in every layer but the lowest."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        return super().forward(x, Context(causal=ctx.causal and not self.layer))


class Fourth(Dense):
    """Reads ahead in the fourth layer alone."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        return super().forward(x, Context(causal=ctx.causal and self.layer != 3))


class RoundsAhead(Dense):
    """Reads keys of its own bucket, as hashing does, and rounds otherwise by what the last token says, as a
    sum does whose order depends on it: by one unit in the last place of a float32."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        bucket = k.argmax(dim=-1)
        same = bucket[..., :, None] == bucket[..., None, :]
        allowed = same & masks.matrix(masks.causal, x.shape[1])
        y = self.projections.merge(masked_attention(q, k, v, allowed))
        return MixerOut(y * (1 + 2.0**-23 * x[:, -1:].sum(dim=-1, keepdim=True).sign()))


class MixesSequences(Dense):
    """Adds a thousandth of what the other sequence of the batch says at the same place."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        return MixerOut(super().forward(x, ctx).y + 1e-3 * x.flip(0))


class StatedLeak(MaskOff):
    """The same leak, stated."""

    @classmethod
    def leak(cls, config: Any) -> str | None:
        return "reads one token ahead"


class Dropped(Dense):
    """Drops outputs at random in training; what the gates look at is no training."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        return MixerOut(F.dropout(super().forward(x, ctx).y, 0.5, self.training))


class Noisy(Dense):
    """Multiplies queries by a random number that it draws in every forward pass, and its reference too."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        drawn = torch.rand((), dtype=torch.float32).to(q)
        return MixerOut(
            self.projections.merge(F.scaled_dot_product_attention(q * drawn, k, v, is_causal=ctx.causal))
        )

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        return self.forward(x, ctx).y


class UnreplayedInBfloat16(Dense):
    """Draws numbers that no strategy can replay, where it runs by autocast."""

    numbers = random.Random(0)
    """Seeded, because two numbers that happen to be close would pass the gate."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        y = super().forward(x, ctx).y
        return MixerOut(y * self.numbers.random() if torch.is_autocast_enabled("cpu") else y)


class WrongAbove(Dense):
    """Wrong in every layer but the lowest."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        return MixerOut(super().forward(x, ctx).y * (1 + 0.001 * self.layer))


class WrongValue(Dense):
    """Scores a thousandth too large: causal, and almost right."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        return MixerOut(
            self.projections.merge(F.scaled_dot_product_attention(q * 1.001, k, v, is_causal=ctx.causal))
        )


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is one thousandth too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.001


class WrongGradient(Dense):
    """Right outputs, wrong gradient."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        y = F.scaled_dot_product_attention(q, k, Scaled.apply(v), is_causal=ctx.causal)
        return MixerOut(self.projections.merge(y))


class Poisoned(torch.autograd.Function):
    """The identity, with a gradient that is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class NoGradient(Dense):
    """Right outputs; the gradients behind the values are NaN."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        q, k, v = self.projections.split(x)
        y = F.scaled_dot_product_attention(q, k, Poisoned.apply(v), is_causal=ctx.causal)
        return MixerOut(self.projections.merge(y))


class NotANumber(Dense):
    """NaN compares with nothing, so a gate that asks `error > tolerance` lets it pass."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        return MixerOut(super().forward(x, ctx).y * float("nan"))


class Silent(Dense):
    """Computes all T × T scores and says nothing of it."""

    IMPLS: ClassVar = {**Dense.IMPLS, "sdpa": Impl(run=naive)}


class Stated(Dense):
    """The same, stated."""

    IMPLS: ClassVar = {**Dense.IMPLS, "sdpa": Impl(run=naive, flop_overhead_reason="computes every score")}


def run_leak(variant: type[Dense]) -> float:
    return leak(variant, variant.Config(), DIMS, 2, CPU)


def run_reference(variant: type[Dense], *, causal: bool = True) -> float:
    return reference_error(variant, variant.Config(), DIMS, 0, CPU, causal=causal)


def future_gradient(variant: type[Dense]) -> float:
    """What a check by gradients sees: how far outputs before a cut depend on inputs after it."""
    torch.manual_seed(0)
    layer = variant(variant.Config(), DIMS)
    x = torch.randn(2, DIMS.seq_len, DIMS.d_model, requires_grad=True)
    layer(x, Context(causal=True)).y[:, :35].sum().backward()
    assert x.grad is not None
    assert x.grad[:, :35].abs().max() > 0
    return x.grad[:, 35:].abs().max().item()


def test_a_right_variant_passes_every_gate() -> None:
    assert run_leak(Dense) <= gates.LEAK_TOLERANCE
    assert run_reference(Dense) <= gates.REFERENCE_TOLERANCE
    assert run_reference(Dense, causal=False) <= gates.REFERENCE_TOLERANCE


@pytest.mark.parametrize(
    "variant",
    [MaskOff, SelectsAhead, ReadsItsBlock, ReadsPastItsBlock, Saturates, Faint, Second, MixesSequences],
)
def test_a_leak_is_caught(variant: type[Dense]) -> None:
    with pytest.raises(GateFailed, match=r"^causality gate: .* \d\.\d+e"):
        run_leak(variant)


def test_a_rounding_that_depends_on_later_tokens_is_caught_in_bfloat16() -> None:
    """There it flips a rounding that counts, or a bucket in a layer above; float32 may take it for noise."""
    assert run_leak(RoundsAhead) <= gates.LEAK_TOLERANCE
    with pytest.raises(GateFailed, match="causality gate"):
        leak(RoundsAhead, RoundsAhead.Config(), DIMS, gates.LEAK_LAYERS, CPU, torch.bfloat16)
    assert leak(Dense, Dense.Config(), DIMS, gates.LEAK_LAYERS, CPU, torch.bfloat16) == 0


def test_a_check_by_gradients_would_let_a_leaking_selection_pass() -> None:
    """Why the gate perturbs: a comparison has no gradient."""
    assert future_gradient(MaskOff) > 0
    assert future_gradient(SelectsAhead) == 0


def test_a_leak_that_is_stated_is_measured() -> None:
    assert run_leak(StatedLeak) > gates.LEAK_TOLERANCE


@pytest.mark.parametrize("variant", [WrongValue, WrongGradient, NotANumber, NoGradient])
def test_a_fast_path_that_is_not_the_reference_is_caught(variant: type[Dense]) -> None:
    with pytest.raises(GateFailed, match=r"^reference gate: layer 0 "):
        run_reference(variant)


def test_a_wrong_gradient_has_right_outputs() -> None:
    """So a gate that compares outputs would have let it pass."""
    torch.manual_seed(0)
    layer = WrongGradient(WrongGradient.Config(), DIMS)
    x = torch.randn(2, DIMS.seq_len, DIMS.d_model)
    torch.testing.assert_close(layer(x, Context(causal=True)).y, layer.reference(x, Context(causal=True)))


def test_a_forward_pass_that_is_no_number_does_not_pass_as_causal() -> None:
    with pytest.raises(GateFailed, match="causality gate"):
        run_leak(NotANumber)


@pytest.mark.parametrize("variant", [Dropped, Noisy])
def test_randomness_is_held_fixed_and_training_is_off(variant: type[Dense]) -> None:
    """A right variant that draws numbers passes: every run of a gate draws the same."""
    assert run_leak(variant) <= gates.LEAK_TOLERANCE
    assert run_reference(variant) <= gates.REFERENCE_TOLERANCE


def ratio_of(variant: type[Dense]) -> float:
    layer = variant(variant.Config(), DIMS)
    with CountFlops() as counter, torch.no_grad():
        layer(torch.randn(2, DIMS.seq_len, DIMS.d_model), Context(causal=True))
    return cost_ratio(counter.total, layer.cost(DIMS), layer.flop_overhead_reason)


def test_more_flops_than_the_formulas_need_a_reason() -> None:
    assert ratio_of(Dense) == 1
    with pytest.raises(GateFailed, match=r"^cost gate: .*without a reason"):
        ratio_of(Silent)
    t = DIMS.seq_len
    assert ratio_of(Stated) == pytest.approx(t * t / (t * (t + 1) / 2))


def test_a_model_without_products_between_tokens_is_compared_in_all() -> None:
    """Such as a running mean: its formulas have parts of single tokens only."""
    plain = Cost({"projections": 1000})
    assert cost_ratio(1000, plain, None) == 1
    with pytest.raises(
        GateFailed, match=r"without products between tokens dispatched 1.100 × .*in all 1,100"
    ):
        cost_ratio(1100, plain, None)
    assert cost_ratio(0, Cost({}), None) == 1
    with pytest.raises(GateFailed, match="inf"):
        cost_ratio(1, Cost({}), None)


def test_no_reason_excuses_any_cost() -> None:
    """Nor fewer FLOPs than the formula's: then the formula is wrong."""
    assert cost_ratio(100 + int(COST_LIMIT * 1000), COST, "blocks") == pytest.approx(COST_LIMIT)
    for dispatched in (100 + int(COST_LIMIT * 1000) + 10, 100 + 980, 100):
        with pytest.raises(GateFailed, match="cost gate"):
            cost_ratio(dispatched, COST, "blocks")
    for dispatched in (100 + 985, 100 + 1015):
        with pytest.raises(GateFailed, match="without a reason"):
            cost_ratio(dispatched, COST, None)


def test_a_general_kernel_may_cost_what_it_says() -> None:
    """An `impl` that computes whole tiles is measured, not refused; unexplained or too little still is."""
    assert cost_ratio(100 + 9000, COST, "tiles", bounded=False) == 9
    for dispatched, reason in ((100 + 9000, None), (100 + 900, "tiles")):
        with pytest.raises(GateFailed, match="cost gate"):
            cost_ratio(dispatched, COST, reason, bounded=False)


# --- the figures kept on disk -----------------------------------------------------------------


def spec_of(variant: str = "dense", **changed: Any) -> CellSpec:
    settings: dict[str, Any] = {
        "variant_params": variants.load(variant).Config().as_dict(),
        "seq_len": 40,
        "depth": 1,
        "batch_size": 1,
        "replicate": 0,
        "objective": "clm",
        "device": "cpu",
        "dtype": "float32",
        "activations": "keep",
        "model": ModelSizes(),
        "data": DataSpec(),
        "measure": MeasureSpec(),
    }
    return CellSpec(variant=variant, **{**settings, **changed})


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "gates").iterdir())


def test_every_kind_of_layer_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers may differ by their place: the second goes through both gates as the lowest does."""
    assert gates.check(spec_of(depth=2), tmp_path, "code").leak_max_abs is not None
    for wrong, message in ((Second, "causality gate"), (WrongAbove, "reference gate: layer 1 ")):
        monkeypatch.setattr(variants, "load", lambda name, wrong=wrong: wrong)
        gates.check(spec_of(depth=1), tmp_path, wrong.__name__)
        with pytest.raises(GateFailed, match=message):
            gates.check(spec_of(depth=2), tmp_path, wrong.__name__)


@pytest.mark.parametrize(
    ("leaky", "depth", "dtype", "caught"),
    [
        (Fourth, 3, "float32", False),
        (Fourth, 4, "float32", True),
        (Fourth, 6, "float32", True),
        (RoundsAhead, 2, "float32", False),
        (RoundsAhead, 4, "bfloat16", True),
    ],
)
def test_causality_is_checked_in_the_cells_depth_and_dtype(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leaky: type[Dense],
    depth: int,
    dtype: str,
    caught: bool,
) -> None:
    monkeypatch.setattr(variants, "load", lambda name: leaky)
    # nothing else is wrong with it
    monkeypatch.setattr(gates, "reference_error", lambda *args, **kwargs: 0.0)
    spec = spec_of(seq_len=DIMS.seq_len, depth=depth, dtype=dtype)
    if caught:
        with pytest.raises(GateFailed, match="causality gate"):
            gates.check(spec, tmp_path, "code")
    else:
        assert gates.check(spec, tmp_path, "code").leak_max_abs is not None


def test_figures_are_taken_once(tmp_path: Path) -> None:
    """What the file says is what a second call returns: nothing is run for it."""
    figures = gates.check(spec_of(), tmp_path, "code")
    assert figures.leak_max_abs is not None
    (path,) = kept(tmp_path)
    assert json.loads(path.read_text()) == taken(figures)
    path.write_text(json.dumps(taken(figures) | {"leak_max_abs": 0.5, "reference_max_abs": 0.25}))
    again = gates.check(spec_of(replicate=3, batch_size=4, activations="checkpoint"), tmp_path, "code")
    assert (again.leak_max_abs, again.reference_max_abs) == (0.5, 0.25)


def test_other_code_or_another_configuration_is_checked_anew(tmp_path: Path) -> None:
    cases = [
        (spec_of(), "code"),
        (spec_of(), "other code"),
        (spec_of(seq_len=41), "code"),
        (spec_of(dtype="bfloat16"), "code"),
        (spec_of(objective="mlm"), "code"),
        (spec_of("chunked", variant_params={"impl": "sdpa", "chunk": 16}), "code"),
        (spec_of("chunked", variant_params={"impl": "sdpa", "chunk": 24}), "code"),
    ]
    figures = [gates.check(spec, tmp_path, code) for spec, code in cases]
    assert len(kept(tmp_path)) == len(cases)
    bidirectional = [
        spec for (spec, _), found in zip(cases, figures, strict=True) if found.leak_max_abs is None
    ]
    assert [spec.objective for spec in bidirectional] == ["mlm"]


def taken(figures: gates.Figures) -> dict[str, Any]:
    """What is kept of the attention's gates; those of a strategy have a file of their own."""
    return {key: value for key, value in vars(figures).items() if key != "recompute_max_abs"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_strategy_is_checked_and_its_figure_kept(tmp_path: Path, dtype: str) -> None:
    assert gates.check(spec_of(dtype=dtype), tmp_path, "code").recompute_max_abs is None
    spec = spec_of(activations="reversible", dtype=dtype)
    figures = gates.check(spec, tmp_path, "code")
    assert figures.recompute_max_abs is not None
    assert figures.recompute_max_abs <= recompute_gate.RECOMPUTE_TOLERANCE[dtype]
    assert len(kept(tmp_path)) == 2
    assert gates.check(spec, tmp_path, "code") == figures


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_strategy_that_does_not_replay_randomness_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(reversible._Replay, "__call__", lambda self: torch.enable_grad())
    with pytest.raises(gates.GateFailed, match="recompute gate: activations=reversible"):
        gates.check(spec_of(activations="reversible", dtype=dtype), tmp_path, "code")


def test_recomputation_is_checked_in_the_cells_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "load", lambda name: UnreplayedInBfloat16)
    monkeypatch.setattr(gates, "leak", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(gates, "dtype_reference_errors", lambda *args, **kwargs: gates.Errors(0.0, 0.0))
    gates.check(spec_of(activations="checkpoint"), tmp_path, "code")
    with pytest.raises(gates.GateFailed, match="recompute gate: activations=checkpoint"):
        gates.check(spec_of(activations="checkpoint", dtype="bfloat16"), tmp_path, "code")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"leak_max_abs": 0}', '{"other": 1}'])
def test_a_damaged_file_is_taken_again(tmp_path: Path, content: str) -> None:
    figures = gates.check(spec_of(), tmp_path, "code")
    (path,) = kept(tmp_path)
    path.write_text(content)
    assert gates.check(spec_of(), tmp_path, "code") == figures
    assert json.loads(path.read_text()) == taken(figures)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    gates.check(spec_of(), tmp_path, "code")
    assert torch.equal(torch.rand(3), want)
