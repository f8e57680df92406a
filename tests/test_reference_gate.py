"""The gate in the cell's own dtype: kernels that are wrong in bfloat16 only are stopped, right ones pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_gates import CPU, Poisoned, spec_of
from torch import Tensor

import variants
from bench.config.spec import CellSpec, ModelSizes
from bench.measure import choices, gates, reference_gate
from bench.measure.gates import GateFailed
from bench.measure.reference_gate import dtype_reference_errors, reference_error, tolerance
from bench.scenarios.support import missing_kernel
from variants.attention.dense import Dense, sdpa
from variants.base import Context, Dims, Impl

HALF = torch.bfloat16
DIMS = Dims(seq_len=70, d_model=64, heads=2)
UNIT = 2.0**-8


class Faster(torch.autograd.Function):
    """The identity, with a gradient that is 8 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.08


def in_half(wrong: Any, head_dim: int | None = None) -> Any:
    """`wrong` in bfloat16, or only there with heads of this size, and right elsewhere."""

    def run(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        broken = q.dtype == HALF and head_dim in (None, q.shape[-1])
        return (wrong if broken else sdpa)(layer, q, k, v, causal)  # type: ignore[no-any-return]

    return run


def scale(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scores 5 % too large."""
    return sdpa(layer, q * 1.05, k, v, causal)


def ahead(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The first token reads the second one too."""
    right = sdpa(layer, q, k, v, causal)
    first = sdpa(layer, q[:, :, :1], k[:, :, :2], v[:, :, :2], False)
    return torch.cat([first, right[:, :, 1:]], dim=2)


def forgets(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The last token does not read the one before it."""
    kept = [*range(q.shape[2] - 2), q.shape[2] - 1]
    last = sdpa(layer, q[:, :, -1:], k[:, :, kept], v[:, :, kept], False)
    return torch.cat([sdpa(layer, q, k, v, causal)[:, :, :-1], last], dim=2)


def gradient(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The gradient of the keys is 8 % too large."""
    return sdpa(layer, q, Faster.apply(k), v, causal)


def no_number(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The gradient of the values is NaN."""
    return sdpa(layer, q, k, Poisoned.apply(v), causal)


FAULTS = (scale, ahead, forgets, gradient, no_number)


def dense_with(run: Any, missing: Any = None) -> type[Dense]:
    impl = Impl(run=run) if missing is None else Impl(run=run, missing=missing)

    class Other(Dense):
        IMPLS: ClassVar = {**Dense.IMPLS, "sdpa": impl}

    return Other


def errors_of(variant: Any, config: Any, dims: Dims, *, causal: bool = True, layer: int = 0) -> Any:
    return dtype_reference_errors(variant, config, dims, layer, CPU, HALF, causal=causal)


FEW_NUMBERS = ("delta_net", "gated_delta_net", "kda", "learnt_sink", "mamba2")
"""The gradient of a number for each head, or of a tap of a convolution, is a sum over all tokens, for which
the gate doubles its limits."""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", variants.mixers())
def test_every_variant_passes_in_bfloat16(name: str, causal: bool) -> None:
    """Its errors are of rounding: there are some, and the limits leave room."""
    variant, dims = variants.load(name), Dims(seq_len=200, d_model=128, heads=4)
    config = variant.Config()
    if reason := variant.unsupported(config, dims, causal=causal):
        pytest.skip(reason)
    has_products = any(True for _ in variant(config, dims).parameters())  # else nothing is in bfloat16
    limit = 12 * UNIT if name in FEW_NUMBERS else 6 * UNIT
    for layer in range(2):
        found = errors_of(variant, config, dims, causal=causal, layer=layer)
        assert (UNIT / 4 if has_products else 0) < found.rms < limit
        assert (UNIT / 4 if has_products else 0) < found.row_rms < limit * 16 / 6


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("reformer", {}), ("routing", {"selection": "topk"}), ("routing", {"selection": "nearest"})],
)
def test_choices_of_the_fast_path_are_those_of_the_reference(
    name: str, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise rounding moves tokens to other buckets and clusters, and a right kernel would be refused."""
    variant, dims = variants.load(name), Dims(seq_len=300, d_model=256, heads=4)
    config = variant.Config(**knobs)
    errors_of(variant, config, dims, causal=False)
    with monkeypatch.context() as patch:
        patch.setattr(reference_gate, "MakesChoices", ())
        with pytest.raises(GateFailed, match="layer 0 in bfloat16: the "):
            errors_of(variant, config, dims, causal=False)


def test_a_choice_that_rounding_to_float32_moves_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 128,000 hidden units is within rounding of 0, and its gradient jumps. More are an error."""
    variant, dims = variants.load("synthesizer"), Dims(seq_len=1000, d_model=64, heads=4)
    assert reference_error(variant, variant.Config(), dims, 1, CPU, causal=True) <= 1e-5
    monkeypatch.setattr(choices, "MOVED", 0)
    monkeypatch.setattr(choices, "FEWEST_MOVED", 0)
    with pytest.raises(GateFailed, match=r"reference gate: 1 of 128000 choices differ .* allowed are 0"):
        reference_error(variant, variant.Config(), dims, 1, CPU, causal=True)


def test_choices_of_another_rule_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    variant, dims = variants.load("reformer"), Dims(seq_len=300, d_model=32, heads=4)
    own = variant.choices  # type: ignore[attr-defined]

    def of_float32(self: Any, x: Tensor, ctx: Context) -> Tensor:
        found: Tensor = own(self, x, ctx)
        return found if x.dtype == torch.float64 else found.roll(1, -1)

    monkeypatch.setattr(variant, "choices", of_float32)
    with pytest.raises(GateFailed, match="choices differ from those of float64"):
        reference_error(variant, variant.Config(), dims, 0, CPU, causal=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_wrong_in_bfloat16_only_is_caught(fault: Any) -> None:
    variant = dense_with(in_half(fault))
    reference_error(variant, variant.Config(), DIMS, 0, CPU, causal=True)
    errors_of(Dense, Dense.Config(), DIMS)
    with pytest.raises(GateFailed) as refused:
        errors_of(variant, variant.Config(), DIMS)
    message = str(refused.value)
    assert message.startswith("reference gate: layer 0 in bfloat16: the ")
    assert "\n" not in message


def test_errors_are_relative_to_the_tensor_and_to_its_rows() -> None:
    """A wrong row shows in the second figure, even if the others are larger; one of nothing is not divided
    by 0."""
    want = torch.tensor([[30.0, 40.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    got = want.float().clone()
    got[1, 0] += 1
    size = (2525 / 6) ** 0.5
    found = reference_gate._errors(got, want)
    assert found == pytest.approx((6**-0.5 / size, 0.5**0.5 / (5 * 0.5**0.5)))
    got[2, 0] += 1
    assert reference_gate._errors(got, want).row_rms == pytest.approx(0.5**0.5 * 16 / size)
    zero = reference_gate._errors(torch.tensor([0.5]), torch.zeros(1).double())
    assert zero == pytest.approx((0.5, 8.0))
    worst = reference_gate.Errors.worst([reference_gate.Errors(1.0, 2.0), reference_gate.Errors(0.5, 3.0)])
    assert worst == (1.0, 3.0)


def test_a_tolerance_follows_from_the_dtype() -> None:
    """Half the roundoff, half the tolerance; longer sums cost float32 roundings only."""
    bfloat16, float16 = (tolerance(dtype, 2000) for dtype in (HALF, torch.float16))
    assert bfloat16.rms == pytest.approx(6 * UNIT, rel=1e-3)
    assert bfloat16.row_rms == pytest.approx(16 * UNIT, rel=1e-3)
    assert float16.rms == pytest.approx(bfloat16.rms / 8, rel=1e-2)
    assert tolerance(HALF, 10**6).rms < 1.01 * bfloat16.rms


# --- in a cell -----------------------------------------------------------------------------------


def half_cell(**changed: Any) -> CellSpec:
    sizes = ModelSizes(d_model=64, heads=2)
    return spec_of(**{"seq_len": 70, "dtype": "bfloat16", "model": sizes, "depth": 2, **changed})


def use(variant: type[Dense], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "load", lambda name: variant)


def test_a_cell_is_compared_in_its_dtype_beside_float32(tmp_path: Path) -> None:
    narrow = gates.check(half_cell(), tmp_path, "code")
    assert narrow.reference_max_abs is not None
    assert narrow.reference_max_abs <= gates.REFERENCE_TOLERANCE
    assert narrow.dtype_reference_rms is not None
    assert narrow.dtype_reference_row_rms is not None
    assert narrow.dtype_reference_row_rms > narrow.dtype_reference_rms > UNIT / 4
    assert narrow.reference_max_abs_reason is None
    assert gates.check(half_cell(replicate=1), tmp_path, "code") == narrow
    assert len(list((tmp_path / "gates").iterdir())) == 1, "measured once"
    wide = gates.check(half_cell(dtype="float32"), tmp_path, "code")
    assert (wide.dtype_reference_rms, wide.dtype_reference_row_rms) == (None, None)


def test_the_cells_own_heads_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong for heads of 32 channels is right for those of the float32 gate."""
    use(dense_with(in_half(gradient, head_dim=32)), monkeypatch)
    with pytest.raises(GateFailed, match="in bfloat16"):
        gates.check(half_cell(), tmp_path, "code")
    gates.check(half_cell(model=ModelSizes(d_model=32, heads=2)), tmp_path, "code")


def only_half(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None if dtype == HALF else "impl=sdpa has no kernel in float32"


def test_a_kernel_without_float32_is_compared_in_the_cells_dtype_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says why one figure is null. It is gated like any other in its own dtype."""
    use(dense_with(sdpa, only_half), monkeypatch)
    spec = half_cell(activations="checkpoint")
    assert missing_kernel(spec, CPU) is None
    assert missing_kernel(replace(spec, dtype="float32"), CPU) == "impl=sdpa has no kernel in float32"
    figures = gates.check(spec, tmp_path, "code")
    assert figures.reference_max_abs is None
    assert figures.reference_max_abs_reason == "no float32: impl=sdpa has no kernel in float32"
    assert None not in (figures.leak_max_abs, figures.dtype_reference_rms, figures.recompute_max_abs)
    for fault in (scale, gradient):
        use(dense_with(fault, only_half), monkeypatch)
        with pytest.raises(GateFailed, match="in bfloat16"):
            gates.check(spec, tmp_path, fault.__name__)


def test_a_kernel_without_small_heads_is_gated_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def run(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        seen.add(q.shape[-1])
        return sdpa(layer, q, k, v, causal)

    use(dense_with(run, lambda device, dtype, head: None if head >= 32 else "too small"), monkeypatch)
    figures = gates.check(half_cell(activations="checkpoint"), tmp_path, "code")
    assert seen == {32}
    assert None not in (figures.reference_max_abs, figures.leak_max_abs, figures.recompute_max_abs)
