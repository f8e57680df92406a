"""dense by one backend of scaled_dot_product_attention: that one runs, or the cell says why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_gates import spec_of
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.config.spec import CellSpec
from bench.measure.flops import CountFlops
from bench.scenarios.support import Unsupported, check_supported
from variants.attention.dense import Dense, DenseConfig
from variants.base import Context, Dims

CPU = torch.device("cpu")
DIMS = Dims(seq_len=70, d_model=64, heads=2)
ON_CUDA = replace(DIMS, device_type="cuda")


def dispatched(impl: str, dims: Dims = DIMS) -> CountFlops:
    layer = Dense(DenseConfig(impl=impl), dims)
    with CountFlops() as counted:
        layer(torch.randn(2, dims.seq_len, dims.d_model), Context(causal=True)).y.sum().backward()
    return counted


@pytest.mark.parametrize(
    ("impl", "kernels"),
    [("sdpa", ("flash_for_cpu",)), ("flash", ("flash_for_cpu",)), ("math", ("math",)), ("naive", ())],
)
def test_the_kernel_that_ran_is_named(impl: str, kernels: tuple[str, ...]) -> None:
    assert dispatched(impl).attention_kernels == kernels


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_math_is_seen_where_torch_falls_back_to_it(causal: bool, dtype: torch.dtype) -> None:
    """float64 heads with dropout have no fused kernel on a CPU: nothing is forced, and nothing is said."""
    q = torch.randn(1, 2, 16, 8, dtype=dtype, requires_grad=True)
    with CountFlops() as counted:
        F.scaled_dot_product_attention(q, q, q, is_causal=causal, dropout_p=0.5).sum().backward()
    assert counted.attention_kernels == ("math",)


@pytest.mark.parametrize("impl", ["cudnn", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_torch_refuses_is_missing_in_one_line(impl: str, dtype: torch.dtype) -> None:
    reason = Dense.missing(DenseConfig(impl=impl), DIMS, device=CPU, dtype=dtype)
    assert reason is not None
    assert reason.startswith(f"impl={impl} does not run heads of 32 channels in {str(dtype)[6:]} on cpu: ")
    assert "\n" not in reason
    with pytest.raises(RuntimeError):
        dispatched(impl)


@pytest.mark.parametrize("impl", ["sdpa", "flash", "math"])
def test_what_runs_here_is_not_missing(impl: str) -> None:
    assert Dense.missing(DenseConfig(impl=impl), DIMS, device=CPU, dtype=torch.bfloat16) is None


def cell(impl: str) -> CellSpec:
    return spec_of(variant_params={"impl": impl})


def test_a_cell_is_unsupported_with_the_reason() -> None:
    with pytest.raises(Unsupported, match="impl=cudnn does not run heads"):
        check_supported(cell("cudnn"))
    check_supported(cell("flash"))


@pytest.mark.parametrize("impl", ["flash", "cudnn", "efficient"])
def test_a_plan_for_a_gpu_needs_no_gpu(impl: str) -> None:
    """The CPU's fused kernel stands for it: as many FLOPs, launches and bytes as with `sdpa`."""
    assert Dense.missing(DenseConfig(impl=impl), ON_CUDA, device=CPU, dtype=torch.bfloat16) is None
    with FakeTensorMode():
        assert dispatched(impl, ON_CUDA).counts == dispatched("sdpa", ON_CUDA).counts


def test_math_is_planned_with_its_scores() -> None:
    with FakeTensorMode():
        planned = dispatched("math", ON_CUDA)
    assert planned.counts == dispatched("math").counts
    assert planned.counts.flops > dispatched("sdpa").counts.flops


def test_backends_that_no_gpu_has_run_are_untried() -> None:
    assert {name for name, impl in Dense.IMPLS.items() if impl.untried} == {"flash", "cudnn", "efficient"}


@pytest.mark.filterwarnings("default")  # compiling warns of deprecations within torch
def test_a_forced_backend_compiles_without_a_graph_break() -> None:
    layer = Dense(DenseConfig(impl="flash"), DIMS)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    x = torch.randn(2, DIMS.seq_len, DIMS.d_model)
    torch.testing.assert_close(compiled(x, Context(causal=True)).y, layer(x, Context(causal=True)).y)
