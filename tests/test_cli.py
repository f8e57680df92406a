"""`python -m bench` as a user meets it: its output, exit status and files.

A cell, a plan and one mistake of each kind are commands of their own processes; others run in this process,
with cells in processes of theirs (`commands`)."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import bench
from conftest import HANG_SECONDS
from tiers import slow, tiered

from bench import CONFIGS
from bench.cli import help
from bench.config.chosen import declared
from bench.config.spec import MeasureSpec, Root
from bench.records import KEYS
from variants.knobs import knobs_of
from variants.slots import FEED_FORWARD, STACK

QUICK = ["data=stdlib", "measure=quick", "measure.time_seconds=0", "seq_len=32", "depth=1"]


def process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process and a folder of its own."""
    command = [sys.executable, "-m", "bench", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG_SECONDS)


def refused(*arguments: str, cwd: Path) -> str:
    """The one line about a mistake."""
    done = bench(*arguments, cwd=cwd)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("records/*.json"))]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_one_cell_writes_one_record_with_the_contract_s_keys(tmp_path: Path) -> None:
    done = process("variant=dense", "seq_len=512", "depth=2", "data=stdlib", "measure=quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "results/adhoc")
    assert tuple(record) == KEYS
    assert record["status"] == "ok"
    row, path = done.stdout.splitlines()
    assert re.match(r"ok +dense T=512 depth=2", row)
    assert json.loads((tmp_path / path).read_text()) == record
    # closed form, forward and backward: linear layers 3 ×, fused attention 2 products and 5
    t, c, vocabulary = 512, 64, 257
    linear = 3 * (2 * (8 * t * c * c + 16 * t * c * c) + 2 * t * c * vocabulary)
    attention = 2 * (2 + 5) * 2 * c * t * (t + 1) // 2
    assert record["flops_executed_step"] == pytest.approx(linear + attention, rel=0.01)
    assert record["flops_attention_step"] == 3 * 4 * c * (t * (t + 1) // 2) * 2


@pytest.mark.slow
def test_a_mixture_is_planned_trained_resumed_and_reported(tmp_path: Path) -> None:
    """From the command line to the report, with knobs of a member; its FLOPs are the sum of its members'."""
    mixture = ["variant=hybrid", "variant.layers=[2xlongformer(window=16),dense]"]
    cell = ["data=stdlib", "seq_len=64", "depth=3", "measure=quick", "measure.time_seconds=0"]
    trained = ["measure.train_tokens=640", "measure.eval_tokens=256", "measure.checkpoint_seconds=0"]
    done = bench(*mixture, *cell, *trained, "name=mixed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "results/mixed")
    layers = ["longformer(window=16)", "longformer(window=16)", "dense"]
    assert (record["status"], record["variant_params"]) == ("ok", {"layers": layers})
    assert record["impl"] == "longformer=fused, dense=sdpa"
    assert str(record["cost_ratio_reason"]).startswith("longformer: ")
    assert float(str(record["leak_max_abs"])) < 1e-5
    assert len(list((tmp_path / "results/mixed/gates").iterdir())) == 2, "one for each kind of layer"

    members = ["variant=dense", "variant=longformer variant.window=16"]
    for number, member in enumerate(members):
        alone = bench(*member.split(), *cell, f"name=member{number}", cwd=tmp_path)
        assert alone.returncode == 0, alone.stderr
    (dense,), (longformer,) = (records(tmp_path / f"results/member{number}") for number in range(2))
    for key in ("flops_attention_step", "flops_algorithmic_step"):
        assert 3 * int(str(record[key])) == 2 * int(str(longformer[key])) + int(str(dense[key])), key

    plan = bench(*mixture, *cell[:3], "measure=plan", "name=planned", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    (planned,) = records(tmp_path / "results/planned")
    assert planned["peak_bytes"] == record["peak_bytes"]
    assert planned["flops_executed_step"] == record["flops_executed_step"]

    again = bench("-m", *mixture, *cell, *trained, "name=mixed", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "1 of 1 cells were finished before" in again.stderr
    report = [sys.executable, "-m", "bench.report", "results/mixed"]
    told = subprocess.run(report, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert told.returncode == 0, told.stderr
    assert "hybrid" in (tmp_path / "results/mixed/report/summary.md").read_text()


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("[longformer,dens]", "did you mean dense?"),
        ("[longformer(windw=5),dense]", "did you mean window?"),
        ("[chunked,transformer_xl]", "allowed is one for all"),
        ("[dense,dense,dense]", "depth=2: the variant has 3 layers and stack=stack makes 2 blocks"),
    ],
)
def test_what_is_no_mixture_is_one_line_and_nothing_is_written(
    layers: str, said: str, tmp_path: Path
) -> None:
    assert said in refused("variant=hybrid", f"variant.layers={layers}", "depth=2", cwd=tmp_path)
    assert not files(tmp_path)


@pytest.mark.slow
def test_sweep_over_all_variants_writes_a_record_a_cell(tmp_path: Path) -> None:
    import variants

    cells = ["-m", "variant=glob(*)", "seq_len=32,48", *QUICK[:3], "depth=2"]
    done = bench(*cells, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {(r["variant"], r["seq_len"], r["status"]) for r in records(tmp_path / "results/adhoc")}
    assert {(v, t) for v, t, _ in found} == {(v, t) for v in variants.names() for t in (32, 48)}
    assert {status for *_, status in found} <= {"ok", "unsupported"}
    assert f"[{len(found)}/{len(found)}]" in done.stderr
    assert "ETA" in done.stderr
    assert not list(tmp_path.glob("[!r]*")), "nothing but results/ is written"

    again = bench(*cells, cwd=tmp_path)
    assert again.returncode == 0
    assert f"{len(found)} of {len(found)} cells were finished before" in again.stderr


@pytest.mark.slow
def test_quality_is_the_same_twice_and_beats_byte_frequencies(tmp_path: Path) -> None:
    cell = [*QUICK[:1], "seq_len=128", "depth=1", "measure.train_tokens=60_000", "measure.eval_tokens=8192"]
    nlls = []
    for name in ("a", "b"):
        done = bench(*cell, "measure.time_seconds=0", f"name={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (record,) = records(tmp_path / "results" / name)
        assert record["perplexity"] < record["unigram_perplexity"] < 256
        nlls.append((record["nll"], tuple(record["nll_by_position"])))
    assert nlls[0] == nlls[1]


@pytest.mark.slow
def test_a_diverging_training_keeps_its_curve_up_to_there(tmp_path: Path) -> None:
    cell = [*QUICK[:1], "seq_len=64", "depth=1", "measure.train_tokens=60_000", "measure.eval_tokens=64"]
    done = bench(*cell, "measure.time_seconds=0", "measure.learning_rate=1e25", cwd=tmp_path)
    assert done.returncode == 1
    (record,) = records(tmp_path / "results/adhoc")
    assert record["status"] == "diverged"
    assert f"at training step {record['diverged_step']} of 938" in str(record["reason"])
    assert record["nll"] is None
    (curve,) = (tmp_path / "results/adhoc/curves").iterdir()
    last = curve.read_text().splitlines()[-1].split(",")
    assert int(last[0]) == record["diverged_step"] - 1  # type: ignore[operator]


@pytest.mark.slow
def test_flops_and_seconds_are_budgets_and_validation_is_another_split(tmp_path: Path) -> None:
    """A cheaper step buys more tokens; what is scored are other documents."""
    cell = [*QUICK[:1], "depth=1", "measure=standard", "measure.time_seconds=0", "measure.eval_tokens=2048"]
    flops = [*cell, "seq_len=128", "measure.train_budget=flops", "measure.train_flops=1e9"]
    done = bench("-m", *flops, "variant=dense,chunked", "measure.eval_split=validation,test", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {(r["variant"], r["eval_split"]): r for r in records(tmp_path / "results/adhoc")}
    for variant in ("dense", "chunked"):
        record, other = found[variant, "test"], found[variant, "validation"]
        steps = record["tokens_trained"] / 128  # type: ignore[operator]
        assert steps == -(-1e9 // record["flops_algorithmic_step"])  # type: ignore[operator]
        assert (record["train_budget"], record["train_amount"]) == ("flops", 1e9)
        assert record["nll"] != other["nll"]
        assert record["tokens_trained"] == other["tokens_trained"]

    seconds = [*cell, "seq_len=128", "measure.train_budget=seconds", "measure.train_seconds=0.5", "name=s"]
    done = bench(*seconds, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "results/s")
    assert 0.5 <= record["train_seconds"] < 10  # type: ignore[operator]
    assert record["train_budget"] == "seconds"
    assert record["tokens_trained"] > 0  # type: ignore[operator]


def test_plan_predicts_a_million_tokens_and_runs_nothing(tmp_path: Path) -> None:
    """Also where the temporary folder is deeper than sockets can be."""
    deep = tmp_path / ("scratch-" * 12)
    deep.mkdir()
    cell = ["measure=plan", "seq_len=1048576", "variant=longformer", "data=stdlib"]
    done = process(*cell, cwd=tmp_path, TMPDIR=str(deep))
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "results/adhoc")
    assert record["status"] == "ok"
    assert record["peak_bytes_source"] == "predicted"
    assert record["peak_bytes"] > 2**30
    assert record["step_seconds_median"] is None


@pytest.mark.slow
def test_twins_are_cells_of_their_own_and_run_after_the_others_of_their_round(tmp_path: Path) -> None:
    cells = ["twin=0,1", "variant=dense,chunked", "replicate=0,1", "remeasure=false"]
    done = bench("-m", *cells, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = sorted(records(tmp_path / "results/adhoc"), key=lambda r: (str(r["started_at"]), r["sequence"]))
    order = [(r["replicate"], r["twin"], r["variant"]) for r in found]
    assert order == [(r, t, v) for r in (0, 1) for t in (0, 1) for v in ("dense", "chunked")]
    assert done.stderr.count("#0 twin 1: ") == 2
    same = [key for key in KEYS if key.startswith(("flops_", "peak_bytes", "data_sha", "code_"))]
    for one, twin in zip(found[0:2] + found[4:6], found[2:4] + found[6:8], strict=True):
        assert [one[key] for key in same] == [twin[key] for key in same]
        assert one["cell_id"] != twin["cell_id"]


@pytest.mark.slow
def test_only_contaminated_cells_are_run_again_and_only_if_asked(tmp_path: Path) -> None:
    """Once a sweep has ended without measuring them again by itself."""
    cells = ["-m", "replicate=0,1", "remeasure=false", *QUICK]
    assert bench(*cells, cwd=tmp_path).returncode == 0
    folder = tmp_path / "results/adhoc/records"
    for path in folder.iterdir():
        record = json.loads(path.read_text())
        marked = "its threads had no core 40% of the time" if record["replicate"] else None
        path.write_text(json.dumps(record | {"contaminated": marked, "git_commit": "before"}))

    left = bench(*cells, cwd=tmp_path)
    assert left.returncode == 0
    assert "2 of 2 cells were finished before" in left.stderr
    assert "1 of 2 cells are contaminated" in left.stderr
    assert "rerun=contaminated" in left.stderr
    again = bench(*cells, "rerun=contaminated", cwd=tmp_path)
    assert again.returncode == 0
    assert "1 of 2 cells were finished before" in again.stderr
    kept = {r["replicate"]: r["git_commit"] == "before" for r in records(folder.parent)}
    assert kept == {0: True, 1: False}


BAD = [
    ("variant=longfromer", "variant=longfromer", "longformer"),
    ("variant.impll=naive", "variant.impll", "variant.impl"),
    ("sqe_len=4", "sqe_len", "seq_len"),
    ("+sqe_len=4", "sqe_len", "seq_len"),
    ("model.head=2", "model.head", "model.heads"),
    ("seq_len=many", "seq_len='many'", "an integer"),
    ("measure.time_seconds=long", "measure.time_seconds='long'", "a number"),
    ("rerun=contaminate", "rerun='contaminate'", "did you mean contaminated?"),
    ("force=maybe", "force='maybe'", "true or false"),
    ("seq_len=0", "seq_len=0", "1 or more"),
    ("depth=-1", "depth=-1", "1 to 65,536"),
    ("model.heads=3", "model.heads=3", "2"),
    ("model.heads=64", "model.heads=64", "even"),
    ("objective=clmm", "objective=clmm", "clm"),
    ("dtype=float16", "dtype='float16'", "bfloat16"),
    ("device=gpu", "device='gpu'", "cuda"),
    ("activations=chekpoint", "activations=chekpoint", "checkpoint"),
    ("variant.impl=fast", "variant.impl='fast'", "sdpa, naive"),
    ("data=books", "data=books", "plays"),
    ("data.name=plaise", "data=plaise", "plays"),
    ("measure=fast", "measure=fast", "quick"),
    ("experiment=smok", "experiment=smok", "smoke"),
    ("name=../elsewhere", "name='../elsewhere'", "folder name"),
    ("seq_len=1,2", "seq_len=1,2", "-m"),
    ("seq_len=[", "seq_len=[", "cannot be read"),
]


SHORT = {"variant=longfromer", "seq_len=0", "model.heads=64", "experiment=smok", "seq_len=1,2", "seq_len=["}
"""One of each kind by default; `test_config` refuses the others in this process."""


@pytest.mark.parametrize(
    ("argument", "names", "allows"),
    tiered((bad[0] if bad[0] in SHORT else None, pytest.param(*bad, id=bad[0])) for bad in BAD),
)
def test_a_mistake_is_one_line_and_writes_nothing(
    argument: str, names: str, allows: str, tmp_path: Path
) -> None:
    done = process(argument, *[q for q in QUICK if q.split("=")[0] != argument.split("=")[0]], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert names in line
    assert allows in line
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_last_cell_of_a_sweep_stops_the_first(tmp_path: Path) -> None:
    assert "seq_len='none'" in refused("-m", "seq_len=32,64,none", *QUICK[:3], "depth=1", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_names_in_a_sweep_stay_as_they_were_typed(tmp_path: Path) -> None:
    names = ["2024_11_26", "1e3", "1.10", "true", "0x10", "007", "1_000", "NaN", "+5", ".5"]
    done = bench("-m", f"name={','.join(names)}", "data=stdlib", "measure=plan", "seq_len=32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {folder.name for folder in (tmp_path / "results").iterdir()} == {*names}
    for name in names:
        assert [record["name"] for record in records(tmp_path / "results" / name)] == [name]


@pytest.mark.slow
def test_the_same_cell_twice_in_a_command_runs_once(tmp_path: Path) -> None:
    cells = ["variant=dense,chunked,dense", "seq_len=32,32", "data=stdlib", "measure=plan"]
    done = bench("-m", *cells, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    twice, read, first, second = done.stderr.splitlines()
    assert twice == "4 of 6 cells are duplicates and run only once; twin=0,1 measures a cell twice"
    assert read.startswith("data=stdlib: train ")
    assert first.startswith("[1/2] ok ")
    assert second.startswith("[2/2] ok ")
    assert len(records(tmp_path / "results/adhoc")) == 2


def test_a_glob_that_matches_nothing_says_so(tmp_path: Path) -> None:
    assert "match nothing" in refused("-m", "variant=glob(q*)", *QUICK, cwd=tmp_path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    quick = [argument for argument in QUICK if not argument.startswith("data")]
    empty = tmp_path / "empty.txt"
    empty.touch()
    for arguments, says in (
        (["data=files"], "data.path is missing"),
        (["data=files", "data.path=nowhere/*.txt"], "data.path=nowhere/*.txt: no such"),
        (["data=files", f"data.path={empty}"], "empty"),
    ):
        assert says in refused(*arguments, *quick, cwd=tmp_path)
    assert files(tmp_path) == [empty]


@pytest.mark.parametrize(
    "results",
    [
        "taken/below",
        "dangling",
        "~nosuchuser/x",
        *slow("taken", "pipe", "loop", "device", "x" * 300, "a/" * 2500),
    ],
)
def test_results_that_cannot_be_written_are_refused(results: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("dangling", "nowhere"), ("loop", "loop"), ("device", "/dev/null")):
        (tmp_path / name).symlink_to(target)
    before = sorted(tmp_path.iterdir())
    line = refused(f"results_dir={results}", *QUICK, cwd=tmp_path)
    assert "results_dir" in line
    assert results[:20] in line
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_too_short_or_not_here_is_a_row_with_the_reason(tmp_path: Path) -> None:
    """A corpus that is shorter than the length, and a kernel."""
    (tmp_path / "short.txt").write_bytes(b"some words of text\n" * 54)
    arguments = [a for a in QUICK if not a.startswith(("data", "seq_len"))]
    cells = ["data=files", "data.path=short.txt", "seq_len=4096", "variant.impl=sdpa,xformers", "device=cpu"]
    done = bench("-m", *cells, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {str(record["variant_params"]["impl"]): record for record in records(tmp_path / "results/adhoc")}  # type: ignore[index]
    assert {record["status"] for record in found.values()} == {"unsupported"}
    assert "bytes to train on; seq_len=4,096 needs more" in str(found["sdpa"]["reason"])
    assert found["sdpa"]["peak_bytes"] is None
    assert "impl=xformers needs a CUDA device" in str(found["xformers"]["reason"])
    assert "a plan" not in str(found["xformers"]["reason"])
    assert found["xformers"]["peak_bytes_predicted"] is None


def test_a_device_that_is_not_here_is_a_row_with_the_reason(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = bench("device=cuda", *QUICK, cwd=tmp_path)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: no cell could run: this machine has no device=cuda")
    (record,) = records(tmp_path / "results/adhoc")
    assert (record["status"], record["device"]) == ("unsupported", "cuda")
    assert "device=cuda" in str(record["reason"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "knob", "measure"),
    [("dense", "impl=flex", "plan"), ("sparse_fixed", "impl=flex", "quick")],
)
def test_a_kernel_that_is_not_here_is_a_row_with_the_reason(
    variant: str, knob: str, measure: str, tmp_path: Path
) -> None:
    """Also in a plan, which runs on fake tensors of the CPU."""
    arguments = ["device=cpu", "data=stdlib", f"measure={measure}", "seq_len=32", "depth=1"]
    done = bench(f"variant={variant}", f"variant.{knob}", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "results/adhoc")
    assert record["status"] == "unsupported"
    assert f"{knob} needs a CUDA device" in str(record["reason"])
    assert ("a plan" in str(record["reason"])) == (measure == "plan")
    assert record["peak_bytes_predicted"] is None


def test_help_names_groups_and_knobs_and_does_not_load_torch(tmp_path: Path) -> None:
    script = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('bench', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("variant: ", "longformer", "seq_len", "experiment: ", "smoke", "python -m bench.report"):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


PRESETS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_help_says_how_long_a_preset_takes(preset: str) -> None:
    (line,) = [line for line in help.presets() if line.startswith(f"  {preset}: ")]
    assert re.search(r"\b(seconds|minutes?|hours?|night|days?)\b", line)


def test_help_describes_every_knob_of_what_is_chosen(tmp_path: Path) -> None:
    chosen = ["variant=reformer", "variant.n_hashes=2", "data=needle", "measure=quick", "tracker=mlflow"]
    text = help.text([*chosen, "feed_forward=glu", "feed_forward.mult=2", "stack=universal"], CONFIGS)
    assert re.search(rf"^  feed_forward: {', '.join(FEED_FORWARD.names())}$", text, re.M)
    assert re.search(rf"^  stack: {', '.join(STACK.names())}$", text, re.M)
    assert re.search(r"activation: silu .*# Function of the gate \(silu, gelu, relu or sigmoid\)", text)
    assert re.search(r"mult: 2 .*# Width of an MLP .* \(an integer, 1 or more\)", text)
    assert re.search(r"^  stack:\n    name: universal$", text, re.M)
    for knob in (*knobs_of(MeasureSpec), *knobs_of(Root), *declared("variant", "reformer").meanings):  # type: ignore[union-attr]
        (line,) = re.findall(rf"^ +{knob}: .*# (.*)$", text, re.M)[:1]
        assert re.search(r"\w.* \(.*\w.*\)$", line), knob
    assert re.search(r"n_hashes: 2 .*# Rounds of hashing.* \(an integer, 1 or more rounds\)", text)
    assert re.search(r"seq_len: 1024 .*# Length of a sequence \(an integer, 1 or more tokens\)", text)
    assert re.search(r"n_depths: 8 .*\(an integer, 2 or more distances\)", text)
    done = bench("--help", "variant=longfromer", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: variant=longfromer: unknown; allowed are adaptive_span, ")


@pytest.mark.slow
def test_progress_on_a_terminal_names_the_cell_and_what_is_left(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "bench", "-m", "replicate=0,1", *QUICK]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"}
    child = subprocess.Popen(command, cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL, env=env)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux ends a pseudo-terminal so
            break
        if not part:
            break
        seen += part
    assert child.wait(timeout=HANG_SECONDS) == 0
    shown = seen.decode()
    assert "dense T=32 depth=1 keep #1" in shown
    assert "0/2" in shown
    assert "2/2" in shown
    assert "ETA" in shown


@pytest.mark.slow
def test_overhead_of_a_cell_is_small_beside_its_work(tmp_path: Path) -> None:
    """No absolute times: what is not asked-for work is less than starting a fresh interpreter with torch."""
    import time

    done = process("-m", "replicate=range(3)", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cells = sorted(records(tmp_path / "results/adhoc"), key=lambda r: str(r["started_at"]))
    overhead = [float(r["seconds_total"]) - float(r["seconds_work"]) for r in cells[1:]]  # type: ignore[arg-type]

    def starting() -> float:
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        return time.monotonic() - begun

    assert min(overhead) < max(starting() for _ in range(3)), "whatever else the machine does"
