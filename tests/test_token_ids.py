"""Token ids of a user: read where they are, in the vocabulary, and with bytes only if they are known."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import Cell
from bench.corpora import Corpus, CorpusError, token_ids, tokens
from bench.corpora.base import SPLITS, Slices, cache_dir
from bench.corpora.token_ids import Joined
from bench.inputs.errors import ConfigError
from bench.records import Record
from bench.run import prepare, sweep
from bench.tasks.base import IGNORED, Setting
from bench.tasks.ids import IdsConfig, IdsOfUser
from bench.tasks.text import Text
from bench.tasks.text_config import TextConfig

IDS = np.random.default_rng(0).integers(0, 500, 24_000)
ROWS = IDS.reshape(40, 600)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for all tests of this file."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGCTX_BENCH_CACHE", str(folder))
        yield folder


def load(path: Path | str, **knobs: Any) -> Corpus:
    """Past the cache in memory: these files change."""
    token_ids.load.cache_clear()
    return IdsOfUser.load_corpus(IdsConfig(path=str(path), **{"vocab_size": 500, **knobs}), "ids")


def documents(corpus: Corpus) -> dict[str, list[list[int]]]:
    return {split: [document.tolist() for document in corpus.split(split)] for split in SPLITS}


def refusal(path: Path | str, **knobs: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        load(path, **knobs)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


def raw(path: Path, ids: npt.NDArray[Any], dtype: str) -> Path:
    ids.astype(np.dtype(dtype).newbyteorder("<")).tofile(path)
    return path


def llm_c(path: Path, ids: npt.NDArray[Any], magic: int, version: int, dtype: str) -> Path:
    """As dev/data/data_common.py of llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    return path


def npy(path: Path, ids: npt.NDArray[Any]) -> Path:
    np.save(path, ids)
    return path


def parquet(path: Path, rows: npt.NDArray[Any], field: str = "input_ids") -> Path:
    pa.parquet.write_table(pa.table({field: [row.tolist() for row in rows]}), path, row_group_size=9)
    return path


STREAMS: dict[str, tuple[Callable[[Path], Path], dict[str, str]]] = {
    "uint16": (lambda at: raw(at / "ids.bin", IDS, "uint16"), {"dtype": "uint16"}),
    "uint32": (lambda at: raw(at / "ids.bin", IDS, "uint32"), {"dtype": "uint32"}),
    "gpt-2": (lambda at: llm_c(at / "ids.bin", IDS, 20240520, 1, "<u2"), {}),
    "llama-3": (lambda at: llm_c(at / "ids.bin", IDS, 20240801, 7, "<u4"), {}),
    "int64": (lambda at: npy(at / "ids.npy", IDS), {}),
    "big-endian": (lambda at: npy(at / "ids.npy", IDS.astype(">u2")), {}),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_is_the_same_corpus_in_every_format(kind: str, tmp_path: Path) -> None:
    write, knobs = STREAMS[kind]
    corpus = load(write(tmp_path), **knobs)
    cut = [round(len(IDS) * share) for share in (0.8, 0.9)]
    parts = (IDS[: cut[0]], IDS[cut[0] : cut[1]], IDS[cut[1] :])
    assert documents(corpus) == {split: [part.tolist()] for split, part in zip(SPLITS, parts, strict=True)}
    assert corpus.sha256 == load(npy(tmp_path / "other.npy", IDS.astype(np.uint16))).sha256
    says = "ids.bin has a header of llm.c: 24,000 ids of uint"
    assert any(note.startswith(says) for note in corpus.notes) == (kind in ("gpt-2", "llama-3"))


def test_rows_are_documents_in_arrays_and_tables(tmp_path: Path) -> None:
    found = [
        load(npy(tmp_path / "a.npy", ROWS.astype(np.uint16))),
        load(parquet(tmp_path / "a.parquet", ROWS)),
    ]
    assert found[0].sha256 == found[1].sha256
    assert documents(found[0]) == documents(found[1])
    every = sorted(document for own in documents(found[0]).values() for document in own)
    assert every == sorted(ROWS.tolist())
    other = load(parquet(tmp_path / "b.parquet", ROWS, "tokens"), field="tokens")
    assert other.sha256 == found[0].sha256


@pytest.mark.parametrize("rows", [False, True])
def test_a_separator_divides_documents(rows: bool, tmp_path: Path) -> None:
    """Against str.split: each id is a character."""
    ids = np.random.default_rng(1).integers(0, 30, 9000)
    file = npy(tmp_path / "a.npy", ids.reshape(9, 1000) if rows else ids)
    corpus = load(file, separator=7)
    lines = ids.reshape(9, 1000) if rows else [ids]
    expected = [part for line in lines for part in "".join(map(chr, line)).split(chr(7)) if part]
    found = ["".join(map(chr, document)) for own in documents(corpus).values() for document in own]
    assert sorted(found) == sorted(expected)


def test_ids_are_read_where_they_are(tmp_path: Path) -> None:
    """A file of ids may be larger than memory: nothing of it is copied."""
    before = {*cache_dir().rglob("*.bin")}
    file = raw(tmp_path / "ids.bin", np.roll(IDS, 1), "uint16")
    corpus = load(file, dtype="uint16")
    assert isinstance(corpus.train, Slices)
    (array,) = corpus.train.arrays
    assert isinstance(array, np.memmap)
    assert Path(str(array.filename)) == file
    assert {*cache_dir().rglob("*.bin")} == before
    index = max(cache_dir().rglob("*.npy"), key=lambda path: path.stat().st_mtime_ns)
    assert index.stat().st_size < 1000


def test_names_of_files_say_the_split(tmp_path: Path) -> None:
    raw(tmp_path / "train.bin", IDS[:20_000], "uint16")
    raw(tmp_path / "val.bin", IDS[20_000:], "uint16")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 500}))
    corpus = load(tmp_path, dtype="uint16")
    found = documents(corpus)
    assert found["validation"] == [IDS[20_000:].tolist()]
    assert [*found["train"][0], *found["test"][0]] == IDS[:20_000].tolist()
    assert corpus.skipped == {".pkl": 1}
    alone = load(tmp_path, dtype="uint16", split="validation")
    assert sum(map(len, alone.train)) == 3200
    raw(tmp_path / "extra.bin", IDS, "uint16")
    assert "the name of extra.bin says no split, others do" in refusal(tmp_path, dtype="uint16")


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.place,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    assert "ids.npy is not an array of numbers" in refusal(tmp_path / "ids.npy")
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "no table (there are: 1 .pkl)" in refusal(tmp_path / "ids.pkl")
    assert not (tmp_path / "sprung").exists()


def test_what_is_not_ids_is_refused_in_a_line(tmp_path: Path) -> None:
    file = raw(tmp_path / "ids.bin", IDS, "uint16")
    assert "data.path is missing" in refusal_of(IdsConfig(vocab_size=500))
    assert "data.dtype is missing: ids.bin has no header; allowed are uint16" in refusal(file)
    assert "holds the id 499; allowed are ids below 499, because data.vocab_size is 499" in refusal(
        file, dtype="uint16", vocab_size=499
    )
    assert "data.separator is 500; allowed are ids below 500" in refusal(file, dtype="uint16", separator=500)
    assert "data.vocab_size is missing" in refusal(file, dtype="uint16", vocab_size=None)
    wide = raw(tmp_path / "wide.bin", IDS, "uint32")
    assert "every second id of wide.bin is 0; its ids seem to be uint32" in refusal(wide, dtype="uint16")
    wide.write_bytes(b"123")
    assert "wide.bin has 3 bytes, which is no multiple of uint16" in refusal(wide, dtype="uint16")
    header = llm_c(tmp_path / "header.bin", IDS, 20240520, 1, "<u2")
    assert "data.dtype=uint32: the header of header.bin says uint16" in refusal(header, dtype="uint32")
    for values, reason in (
        (IDS - 3, "holds the id -3"),
        (IDS / 2, "holds float64 of 1 dimensions; allowed are integers of 1, or of 2"),
        (IDS.reshape(10, 10, 240), "holds int64 of 3 dimensions"),
        (np.asfortranarray(ROWS), "is in Fortran order"),
        (IDS[:0], "the corpus is empty"),
        (IDS[:2], "split is empty; the corpus is too small"),
    ):
        assert reason in refusal(npy(tmp_path / "a.npy", values))
    table = parquet(tmp_path / "a.parquet", ROWS)
    assert "data.field=ids: no such column; there are input_ids; did you mean input_ids?" in refusal(
        table, field="ids"
    )
    pa.parquet.write_table(pa.table({"input_ids": ["text"]}), table)
    assert "holds string; expected lists of integers; data=rows reads text" in refusal(table)
    with pytest.raises(ValueError, match="bpe=300: allowed is null"):
        IdsConfig(bpe=300)


def refusal_of(config: IdsConfig) -> str:
    with pytest.raises(CorpusError) as caught:
        IdsOfUser.load_corpus(config, "ids")
    return str(caught.value)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.sampled_from([None, 77]),
    st.integers(0, 70),
    st.integers(0, 70),
)
def test_the_stream_is_the_documents_in_a_row(
    texts: list[list[int]], kept: list[bool], separator: int | None, start: int, stop: int
) -> None:
    """Some of the documents of an array, in their order and in reverse, with a separator after each there."""
    after = [] if separator is None else [separator]
    ends = np.cumsum([len(text) + len(after) for text in texts]) - len(after)
    begins = ends - [len(text) for text in texts]
    array = np.array([token for text in texts for token in [*text, *after]])
    for order in (1, -1):
        chosen = [k for k in range(len(texts)) if kept[k]][::order] or [0]
        bounds = np.array([[0, begins[k], ends[k]] for k in chosen], dtype=np.int64)
        stream = Joined(Slices([array], bounds), separator)
        whole = [token for k in chosen for token in [*texts[k], *after]]
        assert len(stream) == len(whole)
        assert stream[start:stop].tolist() == whole[start:stop]


# --- with the bytes of the ids ----------------------------------------------------------------

END = "<|end|>"


def tokenizer_file(path: Path) -> Path:
    """A byte-level tokenizer with a special token, as the library writes it."""
    import tokenizers as library

    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    made.train_from_iterator(["the cat and naïve that hat 12 日本 " * 20], trainer)
    made.save(str(path))
    return path


PICKS = np.random.default_rng(3).integers(0, 6, (30, 200))
TEXTS = ["".join(["the ", "cat ", "and ", "naïve ", "日本\n", "hat "][k] for k in row) for row in PICKS]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The texts as ids with a separator after each, and the tokenizer."""
    folder = tmp_path_factory.mktemp("ids")
    file = tokenizer_file(folder / "tokenizer.json")
    library = tokens.from_file(str(file)).tokenizer
    end = library.token_to_id(END)
    ids = [token for text in TEXTS for token in [*library.encode(text).ids, end]]
    return raw(folder / "ids.bin", np.array(ids), "uint16"), file


def task_of(encoded: tuple[Path, Path], **knobs: Any) -> IdsOfUser:
    setting = Setting(data="ids", objective="clm", seq_len=32, batch_size=2, replicate=1, test_tokens=400)
    given = {"path": str(encoded[0]), "dtype": "uint16", "separator": 0, "tokenizer": str(encoded[1])}
    return IdsOfUser(IdsConfig(**{**given, **knobs}), setting)


def test_the_bytes_of_ids_are_those_of_the_text(encoded: tuple[Path, Path]) -> None:
    task = task_of(encoded)
    assert task.unsupported() is None
    assert task.tokenizer is not None
    everything = [
        task.tokenizer.bytes_of_ids.decode(document).tobytes().decode()
        for split in SPLITS
        for document in task.corpus.split(split)
    ]
    assert sorted(everything) == sorted(TEXTS)
    scored = b"".join(text[first:].tobytes() for text, first in task.scored_text(stride=32))
    targets = sum(int((batch.targets != IGNORED).sum()) for batch in task.test_batches(32))
    assert targets == 400
    assert len(scored) == pytest.approx(targets * (task.bytes_per_target() or 0))
    heads = [task.tokenizer.bytes_of_ids.decode(text.ids).tobytes() for text in task.scored_tokens]
    firsts = [task.tokenizer.bytes_of_ids.decode(text.ids[:1]).tobytes() for text in task.scored_tokens]
    assert scored == b"".join(head[len(first) :] for head, first in zip(heads, firsts, strict=True))
    assert all(any(text.encode().startswith(head) for text in TEXTS) for head in heads)


def test_baselines_learn_the_bytes_of_the_training_windows(encoded: tuple[Path, Path]) -> None:
    """A separator is a newline there."""
    task = task_of(encoded)
    assert task.tokenizer is not None
    stream = task.train_tokens.ids[0 : len(task.train_tokens)]
    names = task.tokenizer.bytes_of_ids
    content = b"".join(b"\n" if token == 0 else names.decode(np.array([token])).tobytes() for token in stream)
    for part in task.train_text(5):
        assert part.tobytes() in content
        assert len(part) > 32


def test_bits_per_byte_are_the_same_for_ids_and_for_their_text(
    encoded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document as ids, and the same document as text with the same tokenizer, have as many bytes."""
    ids = task_of(encoded)
    document = TEXTS[0].encode()
    corpus = Corpus(
        name="t",
        train=(np.frombuffer(document, np.uint8),),
        validation=(),
        test=(np.frombuffer(document, np.uint8),),
        sha256="",
    )
    monkeypatch.setattr("bench.tasks.text.corpora.load", lambda *_: corpus)
    text = Text(TextConfig(tokenizer=str(encoded[1])), ids.setting)
    assert text.tokenizer is not None
    assert ids.tokenizer is not None
    found = text.train_tokens
    assert found.ends is not None
    stream = np.array(found.ids)[:-1]  # of the newline after the document
    assert ids.tokenizer.bytes_of_ids.count(stream).sum() == len(document)
    assert np.cumsum(ids.tokenizer.bytes_of_ids.count(stream)).tolist() == found.ends[:-1].tolist()


def test_special_tokens_have_no_bytes_and_ids_must_be_entries(encoded: tuple[Path, Path]) -> None:
    names = tokens.from_file(str(encoded[1])).bytes_of_ids
    assert names.count(np.array([0])).tolist() == [0]
    task = task_of(encoded, separator=None)
    assert (task.train_tokens.ids[0 : len(task.train_tokens)] == 0).any()
    assert task_of(encoded, tokenizer=None, vocab_size=400).bytes_per_target() is None
    gap = tokens.TokenBytes("t", np.zeros(2, np.int64), np.array([1, -1]), np.zeros(9, np.uint8))
    with pytest.raises(CorpusError, match="t: has no entry 1, which the data holds"):
        gap.count(np.array([0, 1]))


# --- a cell -----------------------------------------------------------------------------------


def cells(folder: Path, *overrides: str, replicates: int = 1) -> list[Cell]:
    quick = ["device=cpu", f"results_dir={folder}", "measure.time_seconds=0", "measure.min_samples=1"]
    small = ["model.d_model=16", "depth=1", "seq_len=32", "batch_size=4"]
    train = ["measure.train_tokens=1000", "measure.eval_tokens=300"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return [
            parse(compose("config", overrides=[*quick, *small, *train, *overrides, f"replicate={k}"]))
            for k in range(replicates)
        ]


def run(folder: Path, *overrides: str) -> Record:
    (record,) = sweep.run(cells(folder, *overrides))
    assert record.status == "ok", record.reason
    return record


def test_a_cell_of_ids_has_bits_only_if_the_bytes_are_known(
    encoded: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["data=ids", f"data.path={encoded[0]}", "data.dtype=uint16", "data.separator=0"]
    known = run(tmp_path, *data, f"data.tokenizer={encoded[1]}")
    unknown = run(tmp_path, *data, "data.vocab_size=300")
    assert (unknown.bits_per_byte, unknown.ngram_bits_per_byte, unknown.bytes_evaluated) == (None, None, None)
    assert known.nll is not None
    assert unknown.nll is not None
    assert known.bytes_evaluated is not None
    bits = known.nll / np.log(2) * known.tokens_evaluated / known.bytes_evaluated
    assert known.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert known.ngram_bits_per_byte is not None
    for record in (known, unknown):
        assert record.word_perplexity is None
        assert (record.data_documents, record.data_bytes) == (len(TEXTS), None)
        assert record.data_tokens is not None
        assert record.data_tokens > 3000
        assert record.unigram_perplexity is not None
    said = capfd.readouterr().err
    assert said.count(f"data=ids data.path={encoded[0]}: train ") == 2, "once for each sweep"


def test_what_is_read_is_said_once_and_tokens_are_made_before_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path / "cache"))
    books = tmp_path / "books"
    books.mkdir()
    for k, text in enumerate(TEXTS):
        (books / f"{k}.txt").write_text(text)
    np.save(books / "ids.npy", IDS)
    data = ["data=files", f"data.path={books}", "data.bpe=300"]
    jobs = prepare.prepare_jobs(cells(tmp_path / "results", *data, replicates=2))
    task, config, setting = jobs[0].cell.spec.task()
    made = task(config, setting)
    assert isinstance(made, Text)
    monkeypatch.setattr(tokens.Trained, "encode", lambda *_: pytest.fail("it was encoded before"))
    assert [job.known["data_tokens"] for job in jobs] == [len(made.train_tokens)] * 2
    assert [job.known["data_skipped"] for job in jobs] == ["1 NumPy"] * 2
    assert jobs[0].known["data_bytes"] == sum(len(text.encode()) for text in TEXTS)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("data=files")]
    assert line.endswith("; skipped 1 NumPy")
    assert "in 24 documents; validation " in line


def test_a_plan_encodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "prepare", lambda *_: pytest.fail("a plan needs no tokens"))
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    data = ["data=files", f"data.path={tmp_path / 'a.txt'}", "measure=plan", "measure.train_tokens=0"]
    (job,) = prepare.prepare_jobs(cells(tmp_path, *data))
    assert "data_tokens" not in job.known


def test_a_masked_model_masks_ids(encoded: tuple[Path, Path]) -> None:
    setting = Setting(data="ids", objective="mlm", seq_len=32, batch_size=2, replicate=1, test_tokens=400)
    config = IdsConfig(path=str(encoded[0]), dtype="uint16", vocab_size=300)
    task = IdsOfUser(config, setting)
    batch = task.train_batch(0, 0.0)
    assert torch.equal(batch.inputs == 300, batch.targets != IGNORED)


def test_a_missing_vocabulary_stops_a_sweep_before_its_first_cell(
    encoded: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, CorpusError), match=r"data\.vocab_size is missing"):
        sweep.run(cells(tmp_path, "data=ids", f"data.path={encoded[0]}", "data.dtype=uint16"))
    assert not (tmp_path / "adhoc").exists()
