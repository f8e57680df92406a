"""Figures that a change of structure must not move: 40 small cells against a committed table.

`python tests/test_expected_figures.py` writes the table anew; with the word `new` it only adds cells;
whoever moves a figure says in the changelog which, and why.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiers import REPRESENTATIVES, slow

import variants
from bench import CONFIGS
from bench.cli.overrides import quote_text
from bench.config.parse import parse
from bench.config.spec import digest
from bench.run import isolate, memory_limit, provenance

TABLE = Path(__file__).parent / "data" / "expected_figures.json"
EXACT = ("params", "flops_algorithmic_step", "flops_executed_step", "state_bytes", "peak_bytes_predicted")
"""Computed without a kernel: the same on every machine."""
BYTES = ("peak_bytes", "activation_bytes")
"""Measured from the allocations of a CPU."""
LOSSES = ("nll", "nll_reset")
"""Rounding decides their last digits, and which kernels run decides the rounding."""
ELSEWHERE = 0.01
"""Relative tolerance of what is measured on a processor other than the table's, whose kernels have other work
spaces and another rounding, which flips a hash or a cluster here and there."""

COMMON = (
    "device=cpu",
    "seq_len=75",
    "depth=2",
    "batch_size=2",
    "model.d_model=16",
    "measure=quick",
    "measure.time_seconds=0",
    "measure.min_samples=1",
    "measure.train_tokens=450",
    "measure.eval_tokens=300",
)
SMALL = {  # knobs at which 75 tokens are several windows, segments or buckets
    "chunked": ["variant.chunk=32"],
    "compressive": ["variant.segment=24", "variant.mem_len=16", "variant.comp_len=8", "variant.rate=4"],
    "dense": [],
    "linformer": ["variant.k=16"],
    "longformer": ["variant.window=16"],
    "overlapping": ["variant.chunk=32"],
    "performer": ["variant.n_features=16", "variant.chunk=16"],
    "reformer": ["variant.chunk=8"],
    "routing": ["variant.window=16"],
    "sparse_fixed": ["variant.stride=8"],
    "sparse_strided": ["variant.stride=8"],
    "transformer_xl": ["variant.segment=24", "variant.mem_len=16"],
}
ONE = {  # with one cell: causal, where there is such a form
    "adaptive_span": ["variant.max_span=32", "variant.ramp=8"],
    "axial": ["variant.row=8"],
    "bigbird": ["variant.block=8"],
    "clustered": ["variant.clusters=6", "variant.keys=8"],
    "dynamic_conv": ["variant.kernel=5"],
    "cluster_former": ["variant.window=16", "variant.n_clusters=4", "variant.chunk=16"],
    "entmax": [],
    "etc": ["variant.window=16", "variant.global_tokens=4"],
    "fnet": [],
    "image_transformer": ["variant.block=16", "variant.memory=16"],
    "isab": ["variant.points=8"],
    "light_conv": ["variant.kernel=5"],
    "linear_transformer": ["variant.chunk=16"],
    "long_short": ["variant.window=8", "variant.rank=2", "variant.segment=8"],
    "luna": ["variant.length=8", "variant.chunk=16"],
    "memory_compressed": ["variant.rate=4"],
    "nystrom": ["variant.landmarks=8"],
    "poolingformer": ["variant.window=8", "variant.pooled_window=32", "variant.pool=4"],
    "rfa": ["variant.n_features=16", "variant.chunk=16"],
    "shifted_windows": ["variant.window=16"],
    "sinkhorn": ["variant.block=16"],
    "synthesizer": [],
    "based": ["variant.chunk=16"],
    "delta_net": ["variant.chunk=16"],
    "differential": [],
    "dsa": ["variant.top_k=16", "variant.index_dim=8"],
    "forgetting": [],
    "gated_attention": [],
    "gated_delta_net": ["variant.chunk=16"],
    "gla": ["variant.chunk=16"],
    "infini": ["variant.segment=16"],
    "kda": ["variant.chunk=16"],
    "landmark": ["variant.block=16"],
    "latent_attention": [],
    "learnt_sink": ["variant.window=16"],
    "lightning": ["variant.chunk=16"],
    "mamba2": ["variant.chunk=16"],
    "sparse_qkv": ["variant.modules=4"],
    "block_recurrent": ["variant.window=16", "variant.states=4"],
    "memorizing": ["variant.segment=16", "variant.memory=32", "variant.nearest=4"],
    "moba": ["variant.block=16"],
    "nsa": [
        "variant.compress=8",
        "variant.stride=4",
        "variant.block=8",
        "variant.blocks=4",
        "variant.window=16",
    ],
    "retnet": ["variant.chunk=16"],
    "streaming_llm": ["variant.window=16"],
}
CAUSAL = [name for name in SMALL if name != "linformer"]
BIDIRECTIONAL = [name for name in SMALL if name not in ("transformer_xl", "compressive")]
STRATEGIES = ("checkpoint", "sqrt", "selective", "reversible")
TASKS = {
    "mqar": ["data.n_pairs=4"],
    "needle": [],
    "listops": [],
}


def cells() -> dict[str, list[str]]:
    """Name → overrides."""
    found = {}
    for name in CAUSAL:
        found[f"{name} clm"] = [f"variant={name}", "objective=clm", *SMALL[name]]
    for name in BIDIRECTIONAL:
        found[f"{name} mlm"] = [f"variant={name}", "objective=mlm", *SMALL[name]]
    for name, knobs in ONE.items():
        objective = "clm" if variants.load(name).info.caps.causal else "mlm"
        found[f"{name} {objective}"] = [f"variant={name}", f"objective={objective}", *knobs]
    for strategy in STRATEGIES:
        for name in ("dense", "compressive", "reformer"):
            found[f"{name} {strategy}"] = [f"variant={name}", f"activations={strategy}", *SMALL[name]]
    for task, knobs in TASKS.items():
        found[f"dense {task}"] = ["variant=dense", f"data={task}", *knobs]
    found["longformer bfloat16"] = ["variant=longformer", "dtype=bfloat16", *SMALL["longformer"]]
    found["dense dropout and ff_chunks"] = ["variant=dense", "model.dropout=0.1", "model.ff_chunks=3"]
    mixture = "variant.layers=[longformer(window=16),longformer(window=16),dense]"
    found["hybrid clm"] = ["variant=hybrid", mixture, "depth=3"]
    segments = "variant.layers=[transformer_xl(segment=24,mem_len=16),dense]"
    found["hybrid segments"] = ["variant=hybrid", segments]
    found["routing topk"] = ["variant=routing", "variant.selection=topk", *SMALL["routing"]]
    found["reformer chunk"] = ["variant=reformer", "variant.neighbourhood=chunk", *SMALL["reformer"]]
    return found


class _Told(dict[str, Any]):
    """Stands in for the pipe to a cell's parent."""

    send = dict.update


def figures(name: str, folder: Path) -> dict[str, Any]:
    """What the cell measures. Cells with one folder share the roofline, and the gates of equal layers."""
    overrides = cells()[name]
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"{n} bottles of beer on the wall, {n * n} in all\n" for n in range(200)))
    own = any(word.startswith("data=") for word in overrides)
    data = [] if own else ["data=files", f"data.path={corpus}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cell = parse(
            compose(
                "config", overrides=[*COMMON, *data, *map(quote_text, overrides), f"results_dir={folder}"]
            )
        )
    told = _Told()
    told |= isolate._outcome(cell, digest(name), "code", memory_limit.memory_bytes(cell.spec), told)  # type: ignore[arg-type]
    assert told["status"] == "ok", told["reason"]
    return {key: told.get(key) for key in (*EXACT, *BYTES, *LOSSES)}


def origin() -> dict[str, Any]:
    """What decides the rounding of a loss."""
    return {
        "cpu_model": provenance.cpu_model(),
        "torch_version": torch.__version__,
        "machine": platform.machine(),
    }


def test_there_are_forty_cells_that_cover_every_variant() -> None:
    assert len(cells()) >= 40
    assert {words[0].removeprefix("variant=") for words in cells().values()} == {*variants.names()}
    assert {*json.loads(TABLE.read_text())["cells"]} == {*cells()}


def _tiers() -> list[Any]:
    """The names of all cells; the short tier has those of the mixture and of a variant of each family."""
    short = (*REPRESENTATIVES, "hybrid")
    return [name if name.split()[0] in short else slow(name)[0] for name in cells()]


@pytest.mark.parametrize("name", _tiers())
def test_figures_are_those_of_the_table(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / Path(__file__).stem
    folder.mkdir(exist_ok=True)
    table = json.loads(TABLE.read_text())
    want, got = table["cells"][name], figures(name, folder)
    assert {key: got[key] for key in EXACT} == {key: want[key] for key in EXACT}
    tolerance = 0.0 if origin() == table["origin"] else ELSEWHERE
    for key in (*BYTES, *LOSSES):
        assert got[key] == (want[key] and pytest.approx(want[key], rel=tolerance, abs=0)), key


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = json.loads(TABLE.read_text())["cells"] if sys.argv[1:] == ["new"] else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in cells().keys() - measured.keys():
            measured[name] = figures(name, Path(folder))
            print(name, measured[name], file=sys.stderr)
    in_order = {name: measured[name] for name in cells()}
    TABLE.write_text(json.dumps({"origin": origin(), "cells": in_order}, indent=1) + "\n")
