"""As many records as are asked for, such as sweeps leave: to see what reading and reporting them costs.

`python tests/many_records.py write FOLDER COUNT` writes an experiment;
`python tests/many_records.py table COUNT...` prints a table of the processor time that each count takes.
"""

from __future__ import annotations

import itertools
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import records
from bench.records import Record

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dense": (0, {"impl": "sdpa"}),
    "chunked": (128, {"chunk": 128}),
    "overlapping": (256, {"chunk": 256, "stride": 128}),
    "longformer": (192, {"window": 192, "dilation": [1, 1], "globals": 1}),
    "sparse_strided": (256, {"stride": 128}),
    "sparse_fixed": (256, {"block": 128, "summary": 8}),
    "transformer_xl": (512, {"segment": 256, "memory": 256}),
    "compressive": (512, {"segment": 256, "memory": 256, "ratio": 4}),
    "reformer": (320, {"bucket": 64, "n_hashes": 4}),
    "routing": (256, {"clusters": 8}),
    "linformer": (256, {"projected": 256, "share": "layers"}),
    "performer": (300, {"features": 256, "kernel": "softmax"}),
}
"""Name → (keys that a query reads, knobs)."""
ZOO: dict[str, tuple[str, ...]] = {
    "dense": ("dense",),
    "fixed patterns": (
        *("chunked", "overlapping", "longformer", "sparse_strided", "sparse_fixed", "bigbird", "axial"),
        *("shifted_windows", "image_transformer", "poolingformer", "etc", "light_conv", "dynamic_conv"),
    ),
    "learned patterns": ("reformer", "routing", "sinkhorn", "clustered", "cluster_former", "adaptive_span"),
    "low rank": ("linformer", "nystrom", "long_short", "synthesizer"),
    "kernels": ("performer", "linear_transformer", "rfa", "fnet"),
    "recurrence": ("transformer_xl", "compressive"),
    "memory": ("isab", "luna", "memory_compressed"),
    "sparse weights": ("entmax",),
}
"""Family → variants, as many as there may be in an experiment."""
LENGTHS = [2**power for power in range(8, 16)]
DEPTHS = [1, 2, 4, 8]
REPLICATES = range(5)
ACTIVATIONS = ["keep", "checkpoint", "sqrt", "selective", "reversible"]
WIDTHS = [64, 128, 256, 512, 1024]
REASONS = {
    "oom": "RuntimeError: [enforce fail] can't allocate memory: you tried to allocate {} bytes",
    "unsupported": "seq_len={}: allowed are multiples of chunk=96, the nearest is 288",
    "timeout": "stopped after 600 s, at measure.limit_seconds; {} steps were trained",
    "error": "killed by signal 9, which may be the kernel's doing where memory ran out (rss {} bytes)",
}


def generate(count: int) -> Iterator[Record]:
    """Setting by setting, so that twice as many records have twice as many cells and tables."""
    axes = itertools.product(WIDTHS, ACTIVATIONS, DEPTHS, LENGTHS, VARIANTS, REPLICATES)
    for number, (width, activations, depth, seq_len, variant, replicate) in enumerate(
        itertools.islice(axes, count)
    ):
        yield _record(number, width, activations, depth, seq_len, variant, replicate)


def zoo(*, lengths: int = 4, depths: int = 2, replicates: int = 2) -> Iterator[Record]:
    """Records of each variant of `ZOO`; only those of the shortest length are trained."""
    names = [name for own in ZOO.values() for name in own]
    axes = itertools.product(DEPTHS[:depths], LENGTHS[2 : 2 + lengths], names, range(replicates))
    for number, (depth, seq_len, variant, replicate) in enumerate(axes):
        made = _record(number, WIDTHS[0], "keep", depth, seq_len, variant, replicate)
        if seq_len > LENGTHS[2]:
            made.nll = made.bits_per_byte = made.perplexity = made.nll_by_position = None
        yield made


def _record(
    number: int, width: int, activations: str, depth: int, seq_len: int, variant: str, replicate: int
) -> Record:
    noise = random.Random(number)
    known = 128 * (1 + sum(variant.encode()) % 7), {}
    reads, knobs = VARIANTS.get(variant, known)
    tokens = 4 * seq_len
    attention = int(12 * width * min(reads or seq_len, seq_len) * seq_len / 2 * depth * 4)
    flops = attention + 72 * width * width * depth * tokens
    seconds = (flops / 2e10 + 0.004) * (1.0 if activations == "keep" else 1.3) * (1 + 0.02 * noise.random())
    peak = int(4e6 * depth + tokens * width * 56 * (depth if activations == "keep" else math.sqrt(depth)))
    nll = 1.5 + 0.05 * noise.random() - 0.02 * math.log2(seq_len) - 0.05 * depth
    record = Record(
        cell_id=f"{number:08x}{noise.getrandbits(32):08x}",
        name="many",
        variant=variant,
        variant_params=knobs,
        impl="sdpa",
        seq_len=seq_len,
        depth=depth,
        d_model=width,
        heads=4,
        batch_size=4,
        activations=activations,
        objective="clm",
        data="plays",
        data_params={"tokenizer": "bytes", "validation": 0.05},
        data_sha256="ab" * 32,
        dtype="float32",
        device="cpu",
        device_name="Example CPU @ 2.60GHz",
        replicate=replicate,
        measure="standard",
        status="ok",
        code_sha256=f"{variant:_<16}"[:16],
        git_commit="c" * 40,
        git_dirty=False,
        torch_version="2.13.0+cpu",
        python_version="3.11.9",
        cpu_model="Example CPU @ 2.60GHz",
        threads=2,
        allocator="keeps",
        started_at=f"2026-03-{1 + replicate:02}T{number % 24:02}:{number % 60:02}:00.000+00:00",
        load_average=1.5,
    )
    if noise.random() < 0.04:
        status = noise.choice(list(REASONS))
        record.status = status  # type: ignore[assignment]  # a key of REASONS
        record.reason = REASONS[status].format(noise.getrandbits(30))
        return record
    figures: dict[str, Any] = {
        "seconds_total": 12.0 + noise.random(),
        "leak_max_abs": 1.2e-7,
        "reference_max_abs": 3.4e-6,
        "cost_ratio": 1.0 if variant == "dense" else 1.31,
        "cost_ratio_reason": None if variant == "dense" else "masked pairs inside a block",
        "params": 12 * width * width * depth + 256 * width,
        "flops_algorithmic_step": flops,
        "flops_executed_step": int(flops * 1.2),
        "flops_attention_step": attention,
        "flops_source": "dispatched",
        "peak_bytes": peak,
        "peak_bytes_source": "live_storage",
        "peak_bytes_predicted": peak,
        "peak_phase": "backward",
        "peak_grad_bytes": peak // 8,
        "peak_activation_bytes": peak // 2,
        "peak_workspace_bytes": peak // 8,
        "param_bytes": 48 * width * width * depth,
        "optimizer_bytes": 96 * width * width * depth,
        "activation_bytes": peak // 2,
        "step_seconds_median": seconds,
        "step_seconds_samples": [seconds * (0.99 + 0.02 * noise.random()) for _ in range(30)],
        "forward_seconds_median": seconds / 3,
        "forward_seconds_samples": [seconds / 3 * (0.99 + 0.02 * noise.random()) for _ in range(30)],
        "tokens_per_second": tokens / seconds,
        "forward_tokens_per_second": 3 * tokens / seconds,
        "mfu": 0.2,
        "peak_flops_per_second": 1e11,
        "peak_bytes_per_second": 1e10,
        "claimed_time_exponent": 1.0 if reads else 2.0,
        "claimed_memory_exponent": 1.0,
        "claim_source": "O(n) (a paper, section 3)",
        "claimed_depth_exponent": 1.0 if activations == "keep" else 0.5,
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_byte": nll / math.log(2),
        "unigram_perplexity": 21.5,
        "nll_by_position": [3.0 * math.exp(-0.25 * k) + nll for k in range(int(math.log2(seq_len)) + 1)],
        "tokens_trained": 262_144,
        "tokens_evaluated": 65_536,
        "train_budget": "tokens",
        "train_amount": 262_144.0,
        "learning_rate": 0.003,
        "eval_split": "test",
        "eval_stride": seq_len,
        "train_seconds": 9.0,
        "state_policy": "none",
    }
    for key, value in figures.items():
        setattr(record, key, value)
    return record


def write(folder: Path, count: int) -> None:
    """An experiment of that many records, one a file."""
    (folder / records.RECORDS_DIR).mkdir(parents=True)
    for record in generate(count):  # not synced one by one, as a sweep's are
        records.path_of(folder, record.cell_id).write_text(record.to_json())


def seconds(code: str, folder: Path) -> float:
    """Processor time of a fresh Python that runs the code on a folder, its start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


LOAD = "import sys; from bench import records; records.load(sys.argv[1])"
REPORT = "import sys; from bench.report.__main__ import main; sys.exit(main(sys.argv[1:]))"
COMPACT = "import sys; from bench.records.__main__ import main; sys.exit(main(['compact', *sys.argv[1:]]))"


def table(counts: list[int]) -> None:
    """Processor seconds by count, as Markdown."""
    print("| records | load | report | compact | load of the parts |\n|---:|---:|---:|---:|---:|")
    for count in counts:
        home = Path(tempfile.mkdtemp())
        try:
            write(home / "many", count)
            took = [seconds(code, home / "many") for code in (LOAD, REPORT, COMPACT, LOAD)]
        finally:
            shutil.rmtree(home)
        print(f"| {count:,} | " + " | ".join(f"{each:.1f} s" for each in took) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        table([int(count) for count in sys.argv[2:]])
