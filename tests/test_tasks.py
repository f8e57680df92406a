"""Tasks are found by name, their knobs are checked, and they decide vocabulary, objective and data's hash."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import variants
from bench import corpora, tasks
from bench.cli import errors, overrides
from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.measure import predict
from bench.records import Record, read
from bench.run import prepare, sweep
from bench.tasks.base import IGNORED, Task
from bench.tasks.text import VOCABULARY, Text
from bench.tasks.text_config import MASK

CONFIGS = Path(__file__).parents[1] / "configs"
SYNTHETIC = [name for name in tasks.names() if not issubclass(tasks.load(name), Text)]
"""Those that make their data themselves."""


def spec_of(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["device=cpu", "data=stdlib", *overrides])).spec


def task_of(spec: CellSpec) -> Task:
    task, config, setting = spec.task()
    return task(config, setting)


def refusal(*overrides: str) -> str:
    with pytest.raises(errors.KINDS) as caught:
        spec_of(*overrides)
    message = errors.explain(caught.value, list(overrides), CONFIGS)
    assert "\n" not in message
    return message


def test_a_name_is_a_task_or_a_corpus_by_where_it_is_found() -> None:
    assert "mqar" in SYNTHETIC
    assert not {*SYNTHETIC} & {*corpora.SOURCES, "text", "base"}
    for name in tasks.names():
        assert tasks.load(name).__module__ == f"bench.tasks.{name}"
    for name in corpora.SOURCES:
        assert tasks.load(name) is Text


def test_every_name_is_an_entry_and_no_file_is_of_another() -> None:
    assert overrides.options("data") == sorted([*tasks.names(), *corpora.SOURCES])


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_entry_of_a_task_holds_its_defaults(name: str) -> None:
    spec = spec_of(f"data={name}")
    task, config, _ = spec.task()
    assert config == task.Config()
    assert spec.data.params == task.Config().as_dict()


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_tasks_batches_are_what_a_model_can_be_fed(name: str) -> None:
    """Symbols of the vocabulary, something to score in every sequence, and all of it repeatable."""
    spec = spec_of(f"data={name}", "seq_len=64", "batch_size=3", "measure.eval_tokens=256")
    task = task_of(spec)
    assert task.unsupported() is None
    tested = list(task.test_batches())
    assert sum(len(batch.inputs) for batch in tested) >= 1
    for batch in (task.train_batch(0, 0.0), task.train_batch(9, 0.99), *tested):
        scored = batch.targets != IGNORED
        assert batch.inputs.shape == batch.targets.shape
        assert batch.inputs.shape[1] == 64
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert scored.any(dim=1).all()
        for symbols in (batch.inputs, batch.targets[scored]):
            assert 0 <= int(symbols.min()) <= int(symbols.max()) < task.vocabulary
        if task.distance_edges:
            assert batch.distances is not None
            back = batch.distances[scored]
            assert int(back.min()) >= task.distance_edges[0]
            position = torch.arange(64).expand(scored.shape)[scored]
            row = scored.nonzero()[:, 0]
            assert torch.equal(batch.inputs[row, position - back], batch.targets[scored])
    assert task.guess_accuracy is not None
    assert 0 < task.guess_accuracy < 1


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_inputs_never_hold_the_answer_where_it_is_asked_for(name: str) -> None:
    """Nor later, unless only causal models have the task: a bidirectional model is asked for nothing that it
    could read off beside the question."""
    task = task_of(spec_of(f"data={name}", "seq_len=64", "batch_size=16", "objective=auto"))
    inputs, targets, distances = task.train_batch(1, 0.9)
    for row, position in (targets != IGNORED).nonzero().tolist():
        assert inputs[row, position] != targets[row, position]
        if distances is not None and task.objective != "clm":
            assert targets[row, position] not in inputs[row, position:]


def test_masked_text_does_not_hold_the_answer_either() -> None:
    inputs, targets, _ = task_of(spec_of("objective=mlm", "seq_len=64")).train_batch(0, 0.0)
    assert (inputs[targets != IGNORED] == MASK).all()


@pytest.mark.parametrize("name", ["stdlib", *SYNTHETIC])
def test_the_models_vocabulary_is_the_tasks(name: str) -> None:
    spec = spec_of(f"data={name}", "seq_len=64")
    model = predict.build_model(spec)
    assert model.vocabulary == model.head.out_features == model.embedding.num_embeddings
    assert model.vocabulary == (VOCABULARY if name == "stdlib" else task_of(spec).vocabulary)


@pytest.mark.parametrize("variant", ["dense", "linformer"])
def test_the_objective_is_the_tasks_and_causality_follows_from_it_or_from_the_variant(variant: str) -> None:
    causal = variant == "dense"
    assert variants.load(variant).info.caps.causal == causal
    text, recall = spec_of(f"variant={variant}"), spec_of(f"variant={variant}", "data=mqar")
    assert (text.objective, text.causal) == (("clm", True) if causal else ("mlm", False))
    assert (recall.objective, recall.causal) == ("recall", causal)
    assert not spec_of(f"variant={variant}", "objective=mlm").causal
    assert spec_of(f"variant={variant}", "data=mqar", "objective=recall").causal == causal


def test_knobs_change_the_data_hash_and_the_cell_and_stand_in_the_record(tmp_path: Path) -> None:
    def identity(*overrides: str) -> dict[str, object]:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return prepare.identity(parse(compose("config", overrides=["device=cpu", *overrides])))

    known = identity("data=mqar", "data.n_pairs=8")
    assert known["data"] == "mqar"
    assert known["data_params"] == {**tasks.load("mqar").Config().as_dict(), "n_pairs": 8}
    same, other = identity("data=mqar", "data.n_pairs=8", "replicate=1"), identity("data=mqar")
    assert known["data_sha256"] == same["data_sha256"] != other["data_sha256"]
    assert len({str(i["cell_id"]) for i in (known, same, other)}) == 3
    assert identity("data=stdlib")["data_sha256"] == corpora.load("stdlib").sha256


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("data=mqarr",), ("data=mqarr", "stdlib", "did you mean mqar?")),
        (("data=mqar", "data.n_pair=4"), ("data.n_pair", "did you mean data.n_pairs?")),
        (("data=mqar", "+data.n_pair=4"), ("data.n_pair: unknown", "n_symbols", "did you mean n_pairs?")),
        (("data=mqar", "data.n_pairs=0"), ("data.n_pairs=0", "1 or more")),
        (("data=mqar", "data.n_pairs=few"), ("data.n_pairs='few'", "an integer")),
        (("data=mqar", "data.name=mqra"), ("data=mqra", "did you mean mqar?")),
        (("data=mqar", "objective=clm"), ("mqar objective=clm", "recall")),
        (("data=stdlib", "objective=recall"), ("stdlib objective=recall", "clm", "mlm")),
        (("data=stdlib", "+data.n_pairs=4"), ("data.n_pairs: unknown knob", "path")),
    ],
)
def test_a_mistake_is_refused_in_one_line(overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    message = refusal(*overrides)
    assert all(part in message for part in parts), message


def test_a_module_with_two_tasks_or_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.tasks.mqar as module

    class Second(module.Mqar):
        pass

    Second.__module__ = module.__name__
    monkeypatch.setattr(module, "Second", Second, raising=False)
    with pytest.raises(TypeError, match=r"bench\.tasks\.mqar defines 2 tasks"):
        tasks.load("mqar")


def test_text_asks_its_corpus_for_no_more_than_the_cell_needs() -> None:
    """Where nothing is evaluated a corpus without long test documents will do."""
    task = task_of(spec_of("seq_len=64"))
    assert isinstance(task, Text)
    longest = max(map(len, task.corpus.test))
    for seq_len, test_tokens, refused in ((longest - 1, 1, False), (longest, 1, True), (longest, 0, False)):
        setting = dataclasses.replace(task.setting, seq_len=seq_len, test_tokens=test_tokens)
        reason = Text(task.config, setting).unsupported()  # type: ignore[arg-type]
        assert (reason is not None) == refused


def cell_of(tmp_path: Path, *overrides: str) -> Record:
    """The record of a cell of mqar that ran in its own process."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        knobs = ["device=cpu", "data=mqar", f"results_dir={tmp_path}", "measure.time_seconds=0"]
        (record,) = sweep.run([parse(compose("config", overrides=[*knobs, *overrides]))])
    return record


def test_a_cell_records_how_much_it_recalls(tmp_path: Path) -> None:
    sizes = ["seq_len=20", "batch_size=4", "measure.train_tokens=400", "measure.eval_tokens=2000"]
    record = cell_of(tmp_path, *sizes)
    assert (record.status, record.objective, record.data) == ("ok", "recall", "mqar")
    assert record.guess_accuracy == 0.25
    assert record.accuracy is not None
    assert 0 <= record.accuracy < 0.5
    assert record.distance_edges == [1, 2, 4, 8, 16]
    assert record.accuracy_by_distance is not None
    assert len(record.accuracy_by_distance) == 5
    assert record.reach == 19, "dense attention reads all that lies before the last token"
    assert record.tokens_evaluated == 4 * 100  # four queries in each of 100 sequences
    assert record.nll == pytest.approx(math.log(65), rel=0.2)
    assert (record.perplexity, record.bits_per_byte) == (None, None), "there is no text"
    assert read(tmp_path / "adhoc", record.cell_id) == record


def test_a_cell_too_short_for_its_pairs_is_a_row_with_the_reason(tmp_path: Path) -> None:
    record = cell_of(tmp_path, "seq_len=15")
    assert record.status == "unsupported"
    assert record.reason == "seq_len=15: data=mqar with n_pairs=4 needs 16 tokens or more"


@pytest.mark.slow
def test_dense_attention_solves_what_a_window_that_does_not_reach_cannot(tmp_path: Path) -> None:
    """At the knobs of experiment=recall; chunks of 8 tokens hold a query with its own pair never, for the
    four pairs fill the first chunk."""
    knobs = ["seq_len=64", "batch_size=32", "data.curriculum=0.6", "measure.train_tokens=4_096_000"]
    dense = cell_of(tmp_path, *knobs)
    chunked = cell_of(tmp_path, *knobs, "variant=chunked", "variant.chunk=8")
    assert dense.accuracy is not None
    assert chunked.accuracy is not None
    assert dense.accuracy > 0.99
    assert chunked.accuracy < 0.3
