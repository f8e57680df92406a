"""Dialogues of the user's files: which formats are read, who is scored, and with what before it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import bench
from hydra_sweeps import swept

from bench.config.spec import DataSpec
from bench.corpora import CorpusError, Document, dialogues, tokens
from bench.evaluate import longer
from bench.evaluate.context_use import target_positions
from bench.evaluate.nll import evaluate
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import IGNORED, Batch, Setting
from bench.tasks.dialogue import MAX_ANSWERS, Dialogue, DialogueConfig
from variants import load
from variants.base import Workload

T = 32
Talk = list[tuple[str, str]]
"""The turns of a dialogue: speaker and text."""


def talk(seed: int) -> Talk:
    """One to twenty turns of words, the user first."""
    generator = np.random.default_rng(seed)
    words = ["room", "für", "two", "Sunday?", "\n", "£12", "yes", "no", "", '"quoted"']
    return [
        (("user", "system")[n % 2], " ".join(generator.choice(words, generator.integers(1, 9))))
        for n in range(generator.integers(1, 20) if seed else 40)
    ]


TALKS = [talk(seed) for seed in range(80)]


def lines(talks: list[Talk]) -> str:
    """JSON Lines, with fields that are not read, and blank lines."""
    rows = [{"id": 1, "turns": [{"speaker": s, "text": t, "n": 0} for s, t in one]} for one in talks]
    return "\n\n".join(json.dumps(row) for row in rows)


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Callable[..., Dialogue]]:
    """Writes dialogues as a file, and makes the task of it."""

    def made(content: str, name: str = "d.jsonl", **options: Any) -> Dialogue:
        (tmp_path / name).write_text(content, encoding="utf-8")
        dialogues.load.cache_clear()
        setting = {"seq_len": T, "test_tokens": 10**9, "batch_size": 3, **options.pop("setting", {})}
        config = DialogueConfig(path=str(tmp_path / name), **options)
        return Dialogue(config, Setting(data="dialogue", objective="clm", replicate=0, **setting))

    yield made
    dialogues.load.cache_clear()


def told(one: Talk) -> bytes:
    """A dialogue as the models read it."""
    return "".join(f"{speaker}\x1f{text}\x1e" for speaker, text in one).encode()


def spoken_by(one: Talk, speaker: str) -> list[bytes]:
    return [f"{text}\x1e".encode() for who, text in one if who == speaker]


FORMATS = {
    "multiwoz22.json": lambda talks: json.dumps(
        [{"turns": [{"speaker": s.upper(), "utterance": t} for s, t in one]} for one in talks]
    ),
    "multiwoz21.json": lambda talks: json.dumps(
        {
            f"M{k}.json": {"goal": {}, "log": [{"text": t, "metadata": {}} for _, t in one]}
            for k, one in enumerate(talks)
        }
    ),
    "chat.jsonl": lambda talks: "\r\n".join(
        json.dumps({"messages": [{"role": s, "content": t} for s, t in one]}) for one in talks
    ),
    "bom.jsonl": lambda talks: "\ufeff" + lines(talks),
}


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_are_the_same_dialogues(name: str, read: Callable[..., Dialogue]) -> None:
    plain = read(lines(TALKS)).corpus
    assert read(FORMATS[name](TALKS), name).corpus.sha256 == plain.sha256
    every = [d.tobytes() for split in ("train", "validation", "test") for d in plain.split(split)]
    assert sorted(every) == sorted(map(told, TALKS))


def test_a_folder_is_all_of_its_files(read: Callable[..., Dialogue], tmp_path: Path) -> None:
    whole = read(lines(TALKS)).corpus
    (tmp_path / "d.jsonl").unlink()
    (tmp_path / "parts").mkdir()
    for k in range(2):
        (tmp_path / "parts" / f"{k}.jsonl").write_text(lines(TALKS[k::2]))
    assert dialogues.load("dialogue", str(tmp_path / "parts"), "system").sha256 == whole.sha256
    assert dialogues.load("dialogue", str(tmp_path / "parts" / "*.jsonl"), "system").sha256 == whole.sha256


def test_a_dialogue_stays_in_its_split_when_others_come(read: Callable[..., Dialogue]) -> None:
    few, many = read(lines(TALKS[:40])).corpus, read(lines([talk(seed) for seed in range(400)])).corpus
    for split in ("train", "validation", "test"):
        before, after = ({d.tobytes() for d in corpus.split(split)} for corpus in (few, many))
        assert before <= after
    assert len(many.test) == pytest.approx(40, abs=5 * 40**0.5)
    assert len(many.validation) == pytest.approx(40, abs=5 * 40**0.5)


GOOD = lines([talk(0)])
BAD = {
    "not JSON": ('{"turns": [', "line 3: not JSON: Expecting value (column 12)"),
    "a list": ("[1]", "line 3: found [1]; allowed is an object, which is a dialogue"),
    "no turns": (
        '{"turn": [], "id": 1}',
        "line 3: found turn, id; allowed is turns or log or messages; did you mean turns?",
    ),
    "turns that are no list": ('{"turns": 5}', "line 3: turns=5; allowed is a list of one or more turns"),
    "an empty one": ('{"log": []}', "line 3: log=[]; allowed is a list of one or more turns"),
    "a text as a turn": (
        '{"turns": ["hello"]}',
        'line 3, turn 1: found "hello"; allowed is an object, which is a turn',
    ),
    "nobody": (
        '{"turns": [{"speaker": "user", "text": "a"}, {"speakr": "x", "text": "b"}]}',
        "line 3, turn 2: found speakr, text; allowed is speaker or role; did you mean speaker?",
    ),
    "nobody's name": (
        '{"turns": [{"speaker": " ", "text": "a"}]}',
        "line 3, turn 1: the speaker is empty; allowed is a name",
    ),
    "nothing": (
        '{"turns": [{"role": "user"}]}',
        "turn 1: found role; allowed is text or utterance or content",
    ),
    "a number": ('{"turns": [{"role": "user", "text": 7}]}', "line 3, turn 1: text=7; allowed is text"),
    "a mark": (
        '{"turns": [{"role": "user", "text": "a\\u001eb"}]}',
        "line 3, turn 1: a text has the control character U+001E, which marks turns",
    ),
    "half a character": (
        '{"turns": [{"role": "user", "text": "a\\ud800"}]}',
        "line 3, turn 1: character 2 of a text is half of a pair",
    ),
    "a number without end": ('{"turns": ' + "1" * 5000 + "}", "line 3: not a dialogue: Exceeds the limit"),
    "depth without end": ("[" * 100_000, "line 3: not a dialogue: maximum recursion depth"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_line_that_is_no_dialogue_is_named(kind: str, read: Callable[..., Dialogue]) -> None:
    line, says = BAD[kind]
    with pytest.raises(CorpusError) as caught:
        read(f"{GOOD}\n\n{line}\n{GOOD}")
    assert says in str(caught.value)
    assert "d.jsonl, line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_dialogues_are_refused(read: Callable[..., Dialogue], tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data.path is missing"):
        Dialogue(DialogueConfig(), Setting(data="dialogue", objective="clm", replicate=0, **SMALL))
    with pytest.raises(ValueError, match="max_bytes=9: allowed is null: data=dialogue does not read it"):
        DialogueConfig(max_bytes=9)
    with pytest.raises(CorpusError, match="no such file, folder or glob"):
        dialogues.load("dialogue", str(tmp_path / "none"), "system")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="empty: an empty folder"):
        dialogues.load("dialogue", str(tmp_path / "empty"), "system")
    with pytest.raises(CorpusError, match=r"d.json: not JSON: Extra data .*or name it .jsonl"):
        read(lines(TALKS), "d.json")
    (tmp_path / "l.jsonl").write_bytes(b'{"turns": "\xe9"}')
    with pytest.raises(CorpusError, match="byte 11 is not UTF-8"):
        dialogues.load("dialogue", str(tmp_path / "l.jsonl"), "system")
    with pytest.raises(CorpusError, match=r"d.json, dialogue M.json: found log2; allowed is"):
        read(json.dumps({"M.json": {"log2": []}}), "d.json")
    with pytest.raises(CorpusError, match="answers=systen: no such speaker; there are system, user; did you"):
        read(lines(TALKS), answers="systen")
    with pytest.raises(CorpusError, match="split is empty; the corpus is too small"):
        read(lines(TALKS[:3]))


SMALL = {"seq_len": 8, "batch_size": 1, "test_tokens": 1}


@pytest.mark.parametrize("bpe", [None, 300])
@pytest.mark.parametrize("answers", ["system", "user"])
def test_the_answers_are_scored_and_nothing_else(
    bpe: int | None, answers: str, read: Callable[..., Dialogue], cache: Path
) -> None:
    task = read(lines(TALKS), bpe=bpe, answers=answers)
    by_bytes = {told(one): one for one in TALKS}
    entries = _entries(task)
    scored = 0
    assert len(task.documents) > 4
    for document, passage, groups in zip(task.documents, task.passages, task._groups, strict=True):
        one = by_bytes[document.tobytes()]
        read_bytes = b"".join(entries[i] for i in passage.inputs.tolist())
        assert told(one).startswith(read_bytes)
        assert len(told(one)) - len(read_bytes) <= max(map(len, entries))
        expected = spoken_by(one, answers)
        found = [b""] * len(expected)
        for target, group in zip(passage.targets.tolist(), groups[1:].tolist(), strict=True):
            assert (target == IGNORED) == (group == IGNORED)
            if target != IGNORED:
                found[group] += entries[target]
                scored += 1
        if len(expected) <= MAX_ANSWERS:
            assert found == expected
        else:
            assert found[: MAX_ANSWERS - 1] == expected[: MAX_ANSWERS - 1]
            assert found[MAX_ANSWERS - 1] == b"".join(expected[MAX_ANSWERS - 1 :])
    answered = [one for one in (by_bytes[d.tobytes()] for d in task.corpus.test) if spoken_by(one, answers)]
    total = sum(len(text) for one in answered for text in spoken_by(one, answers))
    assert task.bytes_per_target() * scored == pytest.approx(total)
    words = sum(len(text[:-1].split()) for one in answered for text in spoken_by(one, answers))
    assert task.words_per_byte() == pytest.approx(words / total)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    tokens.trained.cache_clear()


def _entries(task: Dialogue) -> list[bytes]:
    """The bytes of each token."""
    if task.tokenizer is None:
        return [bytes([byte]) for byte in range(256)]
    byte_of = {character: byte for byte, character in enumerate(tokens.ALPHABET)}
    names = [task.tokenizer.tokenizer.id_to_token(i) for i in range(task.tokenizer.size)]
    return [bytes(byte_of[c] for c in name) for name in names]


@pytest.mark.parametrize("bpe", [None, 300])
@pytest.mark.parametrize("stride", [T, 7])
def test_windows_score_each_answer_once_with_its_group(
    bpe: int | None, stride: int, read: Callable[..., Dialogue], cache: Path
) -> None:
    task = read(lines(TALKS), bpe=bpe)
    expected = sum(int((p.targets != IGNORED).sum()) for p in task.passages)
    for batches, groups in (
        (task.test_batches(stride), task.groups(stride).windows),
        (task.test_documents(), task.groups(stride).documents),
    ):
        pairs: list[tuple[Batch, Batch]] = list(zip(batches, groups, strict=True))
        assert sum(int((batch.targets != IGNORED).sum()) for batch, _ in pairs) == expected
        for batch, grouped in pairs:
            assert batch.inputs.equal(grouped.inputs)
            assert (batch.targets == IGNORED).equal(grouped.targets == IGNORED)
    parts = task.scored_text(stride)
    scored = b"".join(sorted(document[start:].tobytes() for document, start in parts))
    whole = [text for d in task.documents for text in spoken_by(_talk(d), "system")]
    assert sorted(scored) == sorted(b"".join(whole))
    assert all(start > 0 for _, start in parts), "an answer has something before it"
    for mask, ids, passage in zip(task.history_targets(), task.token_documents, task.passages, strict=True):
        assert np.array_equal(ids[1:][mask[1:]], passage.targets[passage.targets != IGNORED])
        assert not mask[0]


def _talk(document: np.ndarray[Any, Any]) -> Talk:
    return next(one for one in TALKS if told(one) == document.tobytes())


def test_tokens_of_a_dialogue_are_those_of_the_stream(read: Callable[..., Dialogue], cache: Path) -> None:
    """They end at every mark, so a dialogue among others has the tokens that it has alone."""
    task = read(lines(TALKS), bpe=300)
    alone = (
        [task.tokenizer.encode(d, ends=dialogues.MARKS).ids for d in task.corpus.train]
        if task.tokenizer
        else []
    )
    stream = task.train_tokens
    newline = task.tokens_of(np.frombuffer(b"\n", dtype=np.uint8)).ids
    merged = np.concatenate([part for ids in alone for part in (ids, newline)])
    begins = set(stream.begin(np.arange(len(stream))).tolist())
    marks = np.flatnonzero(np.isin(task.corpus.train_stream, [0x1E, 0x1F])) + 1
    assert set(marks.tolist()) <= begins | {stream.bytes}
    assert len(merged) >= len(stream) >= 0.9 * len(merged)  # a newline may join the name after it


def test_a_budget_takes_whole_dialogues(read: Callable[..., Dialogue]) -> None:
    sizes = []
    for budget in (1, 300, 10**9):
        task = read(lines(TALKS), setting={"test_tokens": budget})
        scored = sum(turn.stop - turn.start for one in task.scored for turn in one.answers)
        assert scored <= budget or len(task.scored) == 1
        sizes.append(len(task.scored))
    assert sizes[0] == 1
    assert sizes == sorted({*sizes})


def test_cells_without_text_are_unsupported(read: Callable[..., Dialogue]) -> None:
    assert read(lines(TALKS)).unsupported() is None
    assert "tokens to train on" in str(read(lines(TALKS), setting={"seq_len": 10**6}).unsupported())
    longest = read(lines(TALKS), setting={"seq_len": 3000}).unsupported()
    assert "the longest of" in str(longest)
    assert "seq_len=3,000 needs a longer one" in str(longest)
    once: list[Talk] = [[("user", "a" * k), ("user", "b")] for k in range(60)]
    answered = once + [[("user", "c" * k), ("system", "d")] for k in range(200)]
    corpus = read(lines(answered)).corpus
    held = {d.tobytes() for d in corpus.test}
    kept = [one for one in answered if told(one) not in held or one in once]
    assert "no test dialogue has a turn of answers=system" in str(read(lines(kept)).unsupported())


def test_who_is_scored_is_part_of_the_hash(read: Callable[..., Dialogue], tmp_path: Path) -> None:
    read(lines(TALKS))
    path = str(tmp_path / "d.jsonl")
    hashes = {Dialogue.sha256(DialogueConfig(path=path, answers=a), "dialogue") for a in ("user", "system")}
    assert len(hashes) == 2


def test_targets_of_histories_are_taken_from_what_is_allowed() -> None:
    generator = np.random.default_rng(0)
    masks = [generator.random(n) < 0.3 for n in (5, 40, 3, 100)]
    possible = [(k, n) for k, mask in enumerate(masks) for n in range(10, len(mask)) if mask[n]]
    assert target_positions([len(m) for m in masks], 10, 10**6, masks) == possible
    few = target_positions([len(m) for m in masks], 10, 7, masks)
    assert len(few) == 7
    assert [possible.index(place) for place in few] == [(2 * k + 1) * len(possible) // 14 for k in range(7)]
    everything = [np.ones(n, dtype=bool) for n in (5, 40, 3, 100)]
    assert target_positions([5, 40, 3, 100], 10, 9, everything) == target_positions([5, 40, 3, 100], 10, 9)


def answer_bytes(documents: Sequence[Document]) -> np.ndarray[Any, Any]:
    """(answers,) the bytes of the first, second, … answers, the last with all later ones."""
    counts = np.zeros(MAX_ANSWERS)
    for document in documents:
        for number, text in enumerate(spoken_by(_talk(document), "system")):
            counts[min(number, MAX_ANSWERS - 1)] += len(text)
    return np.trim_zeros(counts, "b")


@pytest.mark.parametrize("name", ["dense", "transformer_xl"])
def test_the_mean_over_answers_is_the_loss(name: str, read: Callable[..., Dialogue]) -> None:
    """Weighted by their bytes; with state carried over whole dialogues where there is one."""
    task = read(lines(TALKS))
    variant, dims = load(name), Workload(causal=True, batch_size=3, seq_len=T, d_model=16, heads=2)
    torch.manual_seed(0)
    spec = ModelSpec.of(variant, variant.Config(), feed_forward=feed_forward(mult=2))
    others: dict[str, Any] = {"dropout": 0.0, "activations": "keep", "vocabulary": task.vocabulary}
    found = evaluate(
        LanguageModel(spec, dims, depth=1, **others),
        task.test_batches(16),
        documents=task.test_documents() if name == "transformer_xl" else None,
        groups=task.groups(16),
        objective="clm",
        words_per_byte=task.words_per_byte(),
        bytes_per_target=task.bytes_per_target(),
        unigram_nats=task.unigram_nats(),
        device=torch.device("cpu"),
    )
    counts = answer_bytes(task.documents)
    assert found.tokens == counts.sum()
    assert found.nll_by_group is not None
    assert np.average(found.nll_by_group, weights=counts) == pytest.approx(found.nll)
    assert found.nll != found.nll_reset
    assert found.bits_per_byte == pytest.approx(found.nll / np.log(2))


@pytest.mark.slow
def test_records_have_the_loss_of_each_answer(tmp_path: Path) -> None:
    """From real cells."""
    (tmp_path / "d.jsonl").write_text(lines(TALKS))
    command = ["-m", "data=dialogue", "data.path=d.jsonl", f"seq_len={T}"]
    command += [
        "depth=1",
        "measure.time_seconds=0",
        "measure.train_tokens=2000",
        "measure.eval_tokens=100000",
    ]
    command += ["measure.history_targets=8", "variant=dense,transformer_xl,linformer", "name=d"]
    done = bench(*command, cwd=tmp_path)
    found = [json.loads(path.read_text()) for path in tmp_path.glob("results/d/records/*.json")]
    cells = {record["variant"]: record for record in found}
    assert len(cells) == 3, done.stderr
    assert cells["linformer"]["status"] == "unsupported"
    assert "has no causal form" in cells["linformer"]["reason"]
    corpus = dialogues.load("dialogue", str(tmp_path / "d.jsonl"), "system")
    counts = answer_bytes(corpus.test)
    scored = b"".join(text for document in corpus.test for text in spoken_by(_talk(document), "system"))
    for name in ("dense", "transformer_xl"):
        cell = cells[name]
        assert cell["tokens_evaluated"] == cell["bytes_evaluated"] == len(scored)
        assert np.average(cell["nll_by_answer"], weights=counts) == pytest.approx(cell["nll"])
        assert len(cell["nll_by_history"]) == 6
    packed = 8 * len(gzip.compress(scored, 9)) / len(scored)
    assert cells["dense"]["gzip_bits_per_byte"] == pytest.approx(packed, rel=0.1)
    frequencies = np.bincount(np.frombuffer(scored, dtype=np.uint8), minlength=256) / len(scored)
    entropy = -(frequencies[frequencies > 0] * np.log2(frequencies[frequencies > 0])).sum()
    assert cells["dense"]["ngram_bits_per_byte"][0] > entropy


def test_longer_sequences_are_refused_because_they_score_every_token(
    read: Callable[..., Dialogue],
) -> None:
    (cell,) = swept("data=plays", "measure=standard", "measure.longer=2")
    spec = replace(cell.spec, data=DataSpec(name="dialogue"))
    model: Any = SimpleNamespace(position_scheme="rotary")
    found = longer.of_cell(spec, model, read(lines(TALKS)), torch.device("cpu"))
    assert found["longer_reason"] == (
        "data=dialogue: not all tokens are scored, and longer sequences score all"
    )
    assert found.keys() == {"positions", "longer_reason"}
