"""The kernels of fla-core for gated recurrences, which Triton's interpreter runs on the CPU, beside the
recurrence.

A process of its own, because Triton reads the choice of its interpreter where it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import HANG_SECONDS

pytestmark = pytest.mark.peers
ROOT = Path(__file__).resolve().parents[2]

COMPARISON = """
import builtins, sys
import numpy, torch, triton.language as tl
from triton.runtime import autotuner
from triton.runtime.interpreter import TensorHandle

# nothing is measured: the first configuration runs
autotuner.Autotuner._bench = lambda self, *args, config, **meta: [0.0]

import fla.ops.delta_rule, fla.ops.gated_delta_rule, fla.ops.gla, fla.ops.kda
from variants.ops.recurrences.delta_rule import recurrence
from variants.ops.recurrences.channel_scan import channel_recurrence
from variants.ops.recurrences.fla_scans import scan

def number(bound):
    return int(bound.handle.data.item()) if hasattr(bound, "handle") else int(getattr(bound, "value", bound))

def tensors(*bounds):
    # compiled loops count in tensors, the interpreter's in integers, which have no method `to`
    for i in builtins.range(*map(number, bounds)):
        yield tl.core.tensor(TensorHandle(numpy.array([i], numpy.int32), tl.int32), tl.int32)

for name, module in list(sys.modules.items()):
    if name.startswith("fla.ops."):
        module.range = tensors

kernel, dtype, chunk, tokens, keys, values = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
torch.manual_seed(0)
q, k = (torch.randn(1, 2, tokens, keys) for _ in range(2))
unit = kernel != "gla"
v, g = (torch.randn(1, 2, tokens, values) for _ in range(2))
beta = None if kernel == "gla" else torch.rand(1, 2, tokens, 1)
logs = None
if kernel != "delta_rule":
    logs = -torch.rand(1, 2, tokens, 1 if kernel == "gated_delta_rule" else keys)
    logs[:, :, ::7] *= 20
inputs = [x.to(dtype).float() for x in (q, k, v)] + [x for x in (beta, logs) if x is not None]
for x in inputs:
    x.requires_grad_()
q, k, v, *others = inputs
beta = None if kernel == "gla" else others[0]
logs = None if kernel == "delta_rule" else others[-1]

y = scan(kernel, q, k, v, beta, logs, chunk=chunk, dtype=dtype, unit=unit)
assert y.dtype == dtype
got = [y, *torch.autograd.grad(y, inputs, g.to(dtype))]
if unit:
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
want = channel_recurrence(q, k, v, logs) if beta is None else recurrence(q, k, v, beta, logs)
want = [want, *torch.autograd.grad(want, inputs, g.to(dtype).float())]
# a gradient may be 0: that of the first decay is
errors = [((a.float() - b).norm() / b.norm().clamp(min=1)).item() for a, b in zip(got, want, strict=True)]
print(errors, file=sys.stderr)
assert max(errors) < (1e-5 if dtype == torch.float32 else 2**-7), errors
print("equal")
"""


@pytest.mark.parametrize(
    ("kernel", "dtype", "chunk", "tokens", "keys", "values"),
    [
        ("gla", "float32", 16, 1, 16, 16),
        ("gla", "float32", 32, 70, 32, 16),
        ("gla", "float16", 64, 70, 16, 24),
        ("delta_rule", "float32", 16, 20, 16, 16),
        ("delta_rule", "float16", 64, 70, 16, 24),
        ("gated_delta_rule", "float16", 64, 70, 16, 24),
        ("kda", "float32", 32, 40, 16, 16),
        ("kda", "float16", 64, 66, 16, 24),
    ],
)
def test_the_kernels_compute_the_recurrence(
    kernel: str, dtype: str, chunk: int, tokens: int, keys: int, values: int
) -> None:
    for package in ("fla", "triton"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `make test-peers` does it")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    sizes = map(str, (chunk, tokens, keys, values))
    command = [sys.executable, "-c", COMPARISON, kernel, dtype, *sizes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.stdout.endswith("equal\n"), done.stderr
