"""Tokenised text: tokens are bytes, scored bytes are those of byte models, and bits per byte are exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_text import document
from torch import Tensor

from bench.corpora import Corpus, CorpusError, tokens
from bench.corpora.tokens import ALPHABET, FromFile, TextTokenizer, Trained
from bench.evaluate.nll import evaluate
from bench.tasks.base import IGNORED, Setting
from bench.tasks.text import Text
from bench.tasks.text_config import TextConfig

WORDS = [b"the ", b"cat ", b"and ", b"hat\n", b"that's ", "na\u00efve ".encode(), b"\xff\xfe ", b"12, "]


def text_of(seed: int, words: int) -> bytes:
    picks = np.random.default_rng(seed).integers(0, len(WORDS), words)
    return b"".join(WORDS[k] for k in picks)


CORPUS = Corpus(
    name="words",
    train=tuple(document(text_of(k, 2000)) for k in range(2)),
    validation=(document(text_of(7, 100)),),
    test=(document(text_of(8, 400)), document(text_of(9, 90)), document(b"x")),
    sha256="ab" * 32,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LONGCTX_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("bench.tasks.text.corpora.load", lambda *_: CORPUS)
    yield tmp_path
    tokens.trained.cache_clear()
    tokens.from_file.cache_clear()


@pytest.fixture(scope="module")
def small() -> TextTokenizer:
    """270 entries: 256 bytes and 14 merges."""
    parsed = tokens._parsed(tokens.train(CORPUS.train, 270).encode(), Path("trained"))
    return Trained(parsed, "data.bpe=270", "0" * 64)


def byte_level(merges: int = 40, **changed: bool) -> str:
    """The file of a tokenizer as others train them: GPT-2's pre-tokenizer, which reads characters."""
    import tokenizers as library

    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **changed})
    trainer = library.trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    made.train_from_iterator(["the cat na\u00efve \u65e5\u672c\u8a9e and that hat 12 " * 20], trainer)
    return str(made.to_str())


def text_task(seq_len: int = 20, **knobs: object) -> Text:
    setting = Setting(
        data="words", objective="clm", seq_len=seq_len, batch_size=2, replicate=1, test_tokens=700
    )
    return Text(TextConfig(**knobs), setting)  # type: ignore[arg-type]


def test_the_alphabet_is_that_of_the_library() -> None:
    import tokenizers as library

    assert sorted(ALPHABET) == sorted(library.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(ALPHABET)) == 256
    assert (ALPHABET[ord(" ")], ALPHABET[ord("\n")]) == ("Ġ", "Ċ")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=300), st.integers(0, 99).map(lambda seed: text_of(seed, 60))))
def test_tokens_are_the_bytes_of_any_text(small: TextTokenizer, text: bytes) -> None:
    found = small.encode(document(text))
    assert found.ends is not None
    vocabulary = {index: name for name, index in small.tokenizer.get_vocab().items()}
    begin = 0
    for token, end in zip(found.ids.tolist(), found.ends.tolist(), strict=True):
        assert [ALPHABET.index(c) for c in vocabulary[token]] == list(text[begin:end])
        begin = end
    assert begin == len(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.integers(0, 5), st.integers(0, 5))
def test_tokens_of_a_file_are_bytes_also_where_a_character_is_cut(text: str, head: int, tail: int) -> None:
    tokenizer = FromFile(tokens._parsed(byte_level().encode(), Path("f")), "file", "")
    whole = text.replace("<|end|>", "").encode()
    cut = whole[head : max(head, len(whole) - tail)]
    found = tokenizer.encode(document(cut))
    characters = "".join(tokenizer.tokenizer.id_to_token(int(token)) for token in found.ids)
    assert bytes(ALPHABET.index(c) for c in characters) == cut
    assert found.bytes == len(cut)


def test_long_texts_are_encoded_in_pieces(small: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(1, 500)
    whole = small.encode(document(text))
    monkeypatch.setattr(tokens, "PIECE_BYTES", 50)
    pieces = small.encode(document(text))
    assert pieces.bytes == whole.bytes == len(text)
    assert len(pieces) == pytest.approx(len(whole), rel=0.1)


def test_training_is_reproducible_and_cached(cache: Path) -> None:
    assert tokens.trained(CORPUS, 276).size == 276
    (file,) = (cache / tokens.FOLDER).glob("*.json")
    assert file.read_text() == tokens.train(CORPUS.train, 276)
    file.write_text(tokens.train(CORPUS.train, 270))
    tokens.trained.cache_clear()
    assert tokens.trained(CORPUS, 276).size == 270  # it is read, not trained again
    assert tokens.trained(CORPUS, 5000).size < 300, "there are no more pairs"


def test_ids_are_cached_by_text_and_tokenizer(cache: Path, small: TextTokenizer) -> None:
    text = CORPUS.train[0]
    first = tokens.encoded(small, text)
    assert np.array_equal(first.ids, small.encode(text).ids)
    (file,) = (cache / tokens.FOLDER).glob("*.npy")
    np.save(file, np.load(file)[:, :5])
    assert len(tokens.encoded(small, text)) == 5
    assert len(tokens.encoded(small, CORPUS.train[1])) > 5


@pytest.mark.parametrize("knobs", [{"bpe": 270}, {"bpe": 300}])
@pytest.mark.parametrize("stride", [20, 7])
def test_the_scored_bytes_are_those_of_byte_models(knobs: dict[str, int], stride: int) -> None:
    """Each scored byte once, with the bytes before it in its window as context."""
    plain, tokenised = text_task(), text_task(**knobs)
    assert tokenised.unsupported() is None

    def scored(task: Text) -> bytes:
        return b"".join(text[first:].tobytes() for text, first in task.scored_text(stride))

    assert scored(tokenised) == scored(plain)
    targets = sum(len(passage.targets) for passage in tokenised.passages)
    assert round(targets * tokenised.bytes_per_target()) == len(scored(plain)) == 700
    assert tokenised.bytes_per_target() > 1.5 > plain.bytes_per_target() == 1
    batches = list(tokenised.test_batches(stride))
    assert sum(int((batch.targets != IGNORED).sum()) for batch in batches) == targets


def test_the_text_learnt_is_that_of_the_training_windows() -> None:
    """Every training window, in bytes, lies in one of the parts."""
    task = text_task(bpe=270)
    learnt = [part.tobytes() for part in task.train_text(6)]
    names = {index: name for name, index in task.tokenizer.tokenizer.get_vocab().items()}  # type: ignore[union-attr]
    total = 0
    for step in range(6):
        batch = task.train_batch(step, 0.0)
        for inputs, last in zip(batch.inputs.tolist(), batch.targets[:, -1].tolist(), strict=True):
            text = bytes(ALPHABET.index(c) for token in [*inputs, last] for c in names[token])
            assert any(text in part for part in learnt)
            total += len(text)
    assert sum(map(len, learnt)) <= total


class Rules:
    """A language model of text in which each word is a letter and its digit, and words are drawn at random.
    It knows the rules: after a letter its digit, else any word. `follows` are the tokens that may follow
    one."""

    depth_schedule = SimpleNamespace(outputs=lambda length: length)

    def __init__(self, vocabulary: int, follows: dict[int, list[int]]) -> None:
        self.vocabulary = vocabulary
        self.table = torch.full((vocabulary, vocabulary), -torch.inf)
        for token, others in follows.items():
            self.table[token, others] = 0.0

    def eval(self) -> None:
        pass

    def stream(self, inputs: Tensor, *, causal: bool) -> Iterator[tuple[slice, SimpleNamespace]]:
        yield slice(0, inputs.shape[1]), SimpleNamespace(logits=self.table[inputs])


def test_bits_per_byte_of_tokens_equal_those_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of two-byte words, once for bytes and once for tokens: log₂ 8 bits for each word of two
    bytes, whatever a token is."""
    words = [f"{chr(97 + k)}{k}".encode() for k in range(8)]
    picks = np.random.default_rng(0).integers(0, 8, (3, 600))
    texts = [document(b"".join(words[k] for k in row)) for row in picks]
    corpus = Corpus(
        name="pairs", train=(texts[0],), validation=(texts[1],), test=(texts[2],), sha256="cd" * 32
    )
    monkeypatch.setattr("bench.tasks.text.corpora.load", lambda *_: corpus)
    monkeypatch.setattr(tokens, "WORDS", "[a-h][0-7]")
    found = []
    for knobs in ({}, {"bpe": 264}):
        setting = Setting(
            data="pairs", objective="clm", seq_len=20, batch_size=2, replicate=0, test_tokens=601
        )
        task = Text(TextConfig(**knobs), setting)
        letters, digits = ([token_of(task, word[k : k + 1]) for word in words] for k in (0, 1))
        pairs = letters if task.tokenizer is None else [token_of(task, word) for word in words]
        follows = {letter: [digit] for letter, digit in zip(letters, digits, strict=True)}
        follows |= dict.fromkeys({*digits, *pairs} - set(letters), pairs)
        quality = evaluate(
            Rules(task.vocabulary, follows),  # type: ignore[arg-type]
            task.test_batches(20),
            objective="clm",
            words_per_byte=0.5,
            bytes_per_target=task.bytes_per_target(),
            unigram_nats=task.unigram_nats(),
            device=torch.device("cpu"),
        )
        found.append((quality.tokens, quality.bits_per_byte, quality.word_perplexity))
    assert [count for count, *_ in found] == [601, 301]  # one digit, and 300 words
    for _, bits, word in found:
        assert bits == pytest.approx(300 * 3 / 601, rel=1e-6)
        assert word == pytest.approx(2 ** (2 * 300 * 3 / 601), rel=1e-6)


def token_of(task: Text, text: bytes) -> int:
    """The only token of a text."""
    if task.tokenizer is None:
        return text[0]
    (token,) = task.tokenizer.encode(document(text)).ids.tolist()
    return int(token)


def test_masked_models_have_a_mask_beyond_the_tokens() -> None:
    setting = Setting(data="words", objective="mlm", seq_len=20, batch_size=4, replicate=1, test_tokens=700)
    task = Text(TextConfig(bpe=270), setting)
    assert task.vocabulary == 271
    batch = task.train_batch(0, 0.0)
    masked = batch.inputs == 270
    assert masked.any()
    assert torch.equal(masked, batch.targets != IGNORED)
    assert int(batch.targets.max()) < 270


def test_what_is_no_tokenizer_is_refused_in_a_line(tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.json", tmp_path / "broken.json"
    broken.write_text("{}")
    prefix, normal = tmp_path / "prefix.json", tmp_path / "normal.json"
    prefix.write_text(byte_level(add_prefix_space=True))
    normal.write_text(json.dumps(json.loads(byte_level()) | {"normalizer": {"type": "Lowercase"}}))
    for path, reason in ((missing, "cannot read it: No such file"), (broken, "not a tokenizer")):
        with pytest.raises(CorpusError, match=reason) as caught:
            tokens.from_file(str(path))
        assert "\n" not in str(caught.value)
    for path in (prefix, normal):
        with pytest.raises(CorpusError, match="tokens are not the bytes of the text"):
            tokens.from_file(str(path)).encode(document(b"The cat"))
    good = tmp_path / "good.json"
    good.write_text(byte_level())
    with pytest.raises(CorpusError, match="needs text in UTF-8"):
        tokens.from_file(str(good)).encode(document(b"the \xff cat"))
    with pytest.raises(ValueError, match="bpe"):
        TextConfig(bpe=300, tokenizer="x.json")
    with pytest.raises(ValueError, match="bpe=256"):
        TextConfig(bpe=256)


def test_a_file_of_a_user_reads_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = tuple(document(text.tobytes().replace(b"\xff\xfe", b"")) for text in CORPUS.train)
    corpus = Corpus(name="words", train=clean, validation=clean, test=clean, sha256="ef" * 32)
    monkeypatch.setattr("bench.tasks.text.corpora.load", lambda *_: corpus)
    file = tmp_path / "tokens.json"
    file.write_text(byte_level())
    task = text_task(tokenizer=str(file))
    assert task.unsupported() is None
    plain = b"".join(text[first:].tobytes() for text, first in text_task().scored_text(20))
    assert b"".join(text[first:].tobytes() for text, first in task.scored_text(20)) == plain
    assert task.sha256(task.config, "words") != text_task().sha256(TextConfig(), "words") == "ef" * 32


def test_a_text_of_too_few_tokens_is_unsupported() -> None:
    reason = text_task(seq_len=600, bpe=300).unsupported()
    assert reason is not None
    assert "raise measure.eval_tokens" in reason
