"""The stand-in of fla-core's kernels beside the kernels, which Triton's interpreter runs on the CPU.

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
HERE = Path(__file__).resolve().parents[1] / "variants"

COMPARISON = """
import builtins, sys
import numpy, torch, triton.language as tl
from triton.runtime import autotuner
from triton.runtime.interpreter import TensorHandle

# nothing is measured: the first configuration runs
autotuner.Autotuner._bench = lambda self, *args, config, **meta: [0.0]

from fla.ops.common import chunk_h, chunk_o

def number(bound):
    return int(bound.handle.data.item()) if hasattr(bound, "handle") else int(getattr(bound, "value", bound))

def tensors(*bounds):
    # compiled loops count in tensors, the interpreter's in integers, which have no method `to`
    for i in builtins.range(*map(number, bounds)):
        yield tl.core.tensor(TensorHandle(numpy.array([i], numpy.int32), tl.int32), tl.int32)

chunk_h.range = tensors

import fla_stand_in as stand_in

torch.manual_seed(0)
for tokens, features, channels, chunk in ((1, 16, 16, 16), (70, 32, 24, 16), (150, 48, 72, 64)):
    q, k = (torch.rand(2, tokens, 2, features) for _ in range(2))
    v, g = (torch.randn(2, tokens, 2, channels) for _ in range(2))
    start, end = (torch.randn(2, 2, features, channels) for _ in range(2))
    found = []
    for states, outputs in ((chunk_h, chunk_o), (stand_in, stand_in)):
        h, last = states.chunk_fwd_h(k=k, v=v, h0=start, output_final_state=True, chunk_size=chunk)
        y = outputs.chunk_fwd_o(q=q, k=k, v=v, h=h, scale=1.0, chunk_size=chunk)
        dh, first = states.chunk_bwd_dh(
            q=q, k=q, v=g, do=g, h0=end, dht=end, scale=1.0, chunk_size=chunk
        )
        dq, dk, _, _ = outputs.chunk_bwd_dqkwg(
            q=q, k=k, v=v, do=g, h=h, dh=dh, scale=1.0, chunk_size=chunk
        )
        dv = outputs.chunk_bwd_dv(q=q, k=k, do=g, dh=dh, scale=1.0, chunk_size=chunk)
        found.append((h, last, y, dh, first, dq, dk, dv))
    for a, b in zip(*found, strict=True):
        assert a.stride() == b.stride()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
print("equal")
"""


def test_the_kernels_keep_the_contract_of_the_stand_in() -> None:
    for package in ("fla", "triton"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: `make test-peers` does it")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", COMPARISON]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.stdout.endswith("equal\n"), done.stderr
