"""Text from a model that a cell kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import bench
from test_model_options import spec_of

from bench.config.spec import CellSpec
from bench.generate.__main__ import TextModel, main
from bench.train.kept_model import find, load

TRAINED = ["data=stdlib", "seq_len=64", "depth=1", "model.d_model=32", "measure.step=false", "device=cpu"]
TRAINED += ["measure.train_tokens=4000", "measure.eval_tokens=500", "measure.keep_model=true"]


def train(folder: Path, *overrides: str) -> Path:
    done = bench(*TRAINED, f"results_dir={folder}", "name=x", *overrides)
    assert done.returncode == 0, done.stderr
    return folder / "x"


class Generated(NamedTuple):
    """What the command left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Callable[..., Generated]:
    """Runs the command in this process: most of the time of one of its own would be its start."""

    def run(*arguments: str) -> Generated:
        try:
            status = main(arguments)
        except SystemExit as end:  # of the parser
            status = int(end.code or 0)
        return Generated(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("kept"), "variant=longformer", "variant.window=8")


def test_a_text_is_continued_and_the_steps_agree_with_the_parallel_pass(
    folder: Path, generate: Callable[..., Generated]
) -> None:
    arguments = [str(folder), "--prompt", "def ä", "--tokens", "20"]
    command = [sys.executable, "-m", "bench.generate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ä")
    words = done.stderr.strip().splitlines()[-1].split()
    assert words[:6] == ["steps", "and", "a", "parallel", "pass:", "logits"]
    assert float(words[-4]) < 1e-4
    assert done.stdout == generate(*arguments).stdout


@pytest.mark.slow
def test_random_tokens_follow_their_seed(folder: Path, generate: Callable[..., Generated]) -> None:
    def text(seed: str) -> str:
        options = ["--tokens", "40", "--temperature", "2", "--seed", seed]
        return generate(str(folder), "--prompt", "x", *options).stdout

    assert text("1") == text("1") != text("2")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--prompt", ""], "--prompt is empty: allowed is a text of one character or more"),
        (["--prompt", "x" * 50, "--tokens", "15"], "a prompt of 50 tokens and --tokens 15: allowed are 64"),
        (["zz", "--prompt", "x"], "zz: no model of "),
        (["--prompt", "x", "--tokens", "0"], "--tokens 0: allowed is 1 or more"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, arguments: list[str], line: str, generate: Callable[..., Generated]
) -> None:
    done = generate(str(folder), *arguments)
    assert done.returncode == 2
    assert line in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_beyond_the_trained_length_on_request(folder: Path, generate: Callable[..., Generated]) -> None:
    done = generate(str(folder), "--prompt", "x" * 50, "--tokens", "30", "--max-len", "80")
    assert done.returncode == 0, done.stderr


def test_a_model_of_other_code_is_refused(
    folder: Path, tmp_path: Path, generate: Callable[..., Generated]
) -> None:
    path = find(folder, "")
    kept = torch.load(path, weights_only=True)
    (tmp_path / "models").mkdir()
    torch.save({**kept, "code_sha256": "0" * 16}, tmp_path / "models" / path.name)
    done = generate(str(tmp_path), "--prompt", "x")
    assert done.returncode == 2
    assert "the model was trained by other code (0000000000000000, here " in done.stderr
    (tmp_path / "models" / path.name).write_bytes(b"not a model")
    done = generate(str(tmp_path), "--prompt", "x")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "cannot be read" in done.stderr


def test_a_folder_without_models_says_how_to_keep_one(
    tmp_path: Path, generate: Callable[..., Generated]
) -> None:
    done = generate(str(tmp_path), "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("keeps no model; train its cells with measure.keep_model=true")


@pytest.mark.slow
def test_tokens_of_a_tokenizer_become_text(tmp_path: Path, generate: Callable[..., Generated]) -> None:
    kept = train(tmp_path, "data.bpe=300", "variant=dense", "measure.eval_tokens=4000")
    model = TextModel(load(find(kept, "")))
    text = "for line in lines: print(line)"
    assert b"".join(model.decode(int(token)) for token in model.encode(text)).decode() == text
    assert generate(str(kept), "--prompt", text, "--tokens", "5").returncode == 0


def test_a_cell_is_restored_from_its_values() -> None:
    from dataclasses import asdict

    spec = spec_of("variant=sparse_fixed", "feed_forward=glu", "stack=universal", "measure=thorough")
    assert CellSpec.from_values(asdict(spec)) == spec
