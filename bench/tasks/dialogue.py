"""Dialogue: language modelling on whole dialogues, of which only the answers are scored.

Shapes: N tokens of a dialogue. ␟ ends the name of a speaker, ␞ ends a turn (`bench.corpora.dialogues`).

    text      user␟A room for two?␞system␟For which night?␞user␟Sunday␞system␟Booked.␞
    scored                               ^^^^^^^^^^^^^^^^^                  ^^^^^^^^
    group                                0                                  1

The data are dialogues of the user, such as MultiWOZ, in JSON files. Training is that of text, on all tokens
of the dialogues one after the other. The test scores the answers: the text of the turns of one speaker, with
the end of the turn, which says that the answer is complete. Everything before an answer in its dialogue is
its context, as far as a window reaches; questions count only as context. The loss is also averaged over the
first, second, … answers of the dialogues.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.corpora import Corpus, Document, dialogues
from bench.corpora.base import Ids, sha256
from bench.corpora.tokens import TokenText
from bench.tasks.base import IGNORED, Setting, TaskConfig
from bench.tasks.text import Text
from bench.tasks.text_config import TextConfig
from bench.tasks.windows import Numbered, Passage, sliding_windows
from variants.knobs import knob, knobs_of

MAX_ANSWERS = 16
"""Answers of a dialogue with a group of their own; the last group has all later answers too."""


_READ = {"path", "bpe", "tokenizer"}
"""Knobs of a corpus that dialogues have too."""


@dataclass(frozen=True, kw_only=True)
class DialogueConfig(TextConfig):
    """Knobs of dialogues; data.path is a file, folder or glob of JSON files."""

    answers: str = knob("system")
    """Speaker whose turns are scored, in lower case: system for MultiWOZ, assistant for chat models."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in {*knobs_of(TextConfig)} - _READ:
            self.require(name, getattr(self, name) is None, "null: data=dialogue does not read it")


class _Scored(NamedTuple):
    """A dialogue whose answers are scored."""

    document: Document
    text: TokenText
    answers: list[dialogues.Turn]
    """The turns of the speaker that is scored."""

    def groups(self) -> npt.NDArray[np.int64]:
        """(N,) the number of the answer in which each token is, or IGNORED."""
        byte_groups = np.full(len(self.document), IGNORED)
        for number, turn in enumerate(self.answers):
            byte_groups[turn.start : turn.stop] = min(number, MAX_ANSWERS - 1)
        return np.asarray(byte_groups[self.text.begin(np.arange(len(self.text)))], dtype=np.int64)


class Dialogue(Text):
    """Predict the answers of dialogues. The tokens of a byte-pair encoding end at the end of each turn and of
    each speaker's name, so the scored bytes do not depend on the tokens; `test_tokens` counts them."""

    Config = DialogueConfig
    config: DialogueConfig
    objectives = ("clm",)
    token_ends = dialogues.MARKS

    def __init__(self, config: DialogueConfig, setting: Setting) -> None:
        """Loads the dialogues. Raises corpora.CorpusError if they cannot be read."""
        super().__init__(config, setting)
        self.config = config

    @classmethod
    def load_corpus(cls, config: TextConfig, data: str) -> Corpus:
        """Load the dialogues. Raises corpora.CorpusError, also if nobody in them is `answers`."""
        assert isinstance(config, DialogueConfig)
        return dialogues.load(data, config.path, config.answers)

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """Return the hash of the dialogues, of the tokenizer if there is one, and of the speaker, who decides
        which text is scored. Raises corpora.CorpusError."""
        assert isinstance(config, DialogueConfig)
        return sha256(f"{super().sha256(config, data)} {config.answers}".encode())

    def unsupported(self) -> str | None:
        """There must be more training tokens than a window has, and a scored dialogue that fills one."""
        seq_len, split = self.setting.seq_len, self.setting.test_split
        if len(self.train_tokens) <= seq_len:
            have = f"{len(self.train_tokens):,} tokens to train on"
            return f"data={self.corpus.name} has {have}; seq_len={seq_len:,} needs more"
        if not self.setting.test_tokens:
            return None
        if not self.scored:
            return f"data={self.corpus.name}: no {split} dialogue has a turn of answers={self.config.answers}"
        if (longest := max(len(p.targets) for p in self.passages)) < seq_len:
            return (
                f"data={self.corpus.name}: the longest of {len(self.scored):,} scored {split} dialogues has "
                f"{longest:,} tokens of context; seq_len={seq_len:,} needs a longer one"
            )
        return None

    def _answers(self, document: Document) -> list[dialogues.Turn]:
        return [turn for turn in dialogues.turns_of(document) if turn.speaker == self.config.answers]

    @cached_property
    def scored(self) -> list[_Scored]:
        """The dialogues that are scored, whole: at least one and otherwise at most `test_tokens` bytes of
        answers. Their order, by hash, is arbitrary, so the first are a sample."""
        found: list[_Scored] = []
        left = self.setting.test_tokens
        for document in self.corpus.split(self.setting.test_split):
            answers = self._answers(document)
            left -= sum(turn.stop - turn.start for turn in answers)
            if left < 0 and found:
                break
            if answers:
                found.append(_Scored(document, self._tokens_of_one(document), answers))
        return found

    def _tokens_of_one(self, document: Document) -> TokenText:
        """As `tokens_of`, without a file for each dialogue."""
        if self.tokenizer is None:
            return TokenText(document)
        return self.tokenizer.encode(document, ends=self.token_ends)

    @property
    def documents(self) -> tuple[Document, ...]:
        """The dialogues that are scored."""
        return tuple(one.document for one in self.scored)

    @property
    def token_texts(self) -> list[TokenText]:
        """The dialogues that are scored, as tokens."""
        return [one.text for one in self.scored]

    @property
    def token_documents(self) -> list[Ids]:
        """The tokens of the dialogues that are scored."""
        return [one.text.ids for one in self.scored]

    @cached_property
    def scored_tokens(self) -> list[TokenText]:
        """The tokens of the dialogues that are scored."""
        return [one.text for one in self.scored]

    @cached_property
    def passages(self) -> list[Passage]:
        """The dialogues; only the targets within answers are scored."""
        found = []
        for one, groups in zip(self.scored, self._groups, strict=True):
            ids = one.text.ids.astype(np.int64)
            found.append(Passage(ids[:-1], np.where(groups[1:] == IGNORED, IGNORED, ids[1:])))
        return found

    @cached_property
    def _groups(self) -> list[npt.NDArray[np.int64]]:
        return [one.groups() for one in self.scored]

    def groups(self, stride: int) -> Numbered:
        """The group of a target is the number of its answer."""
        passages = [Passage(p.inputs, g[1:]) for p, g in zip(self.passages, self._groups, strict=True)]
        return self.numbered(passages, stride)

    def history_targets(self) -> list[npt.NDArray[np.bool_]]:
        """Only tokens of answers are targets of the context use."""
        return [groups != IGNORED for groups in self._groups]

    def bytes_per_target(self) -> float:
        """Mean number of bytes of a scored target; exact, because tokens are bytes."""
        scored = sum(turn.stop - turn.start for one in self.scored for turn in one.answers)
        return scored / sum(int((groups != IGNORED).sum()) for groups in self._groups)

    def words_per_byte(self) -> float:
        """Words per byte of the answers of the test split."""
        texts = [
            document[turn.start : turn.stop].tobytes()
            for document in self.corpus.test
            for turn in self._answers(document)
        ]
        return sum(len(text[:-1].split()) for text in texts) / sum(map(len, texts))

    def scored_text(self, stride: int) -> list[tuple[Document, int]]:
        """Return the answers as bytes: each with what is before it in its window, and the place of its first
        byte that is scored. An answer in two windows is in two parts."""
        found = []
        windows = sliding_windows([len(p.targets) for p in self.passages], self.setting.seq_len, stride)
        for k, start, stop, scored in windows:
            one = self.scored[k]
            begin, first, end = one.text.begin(np.array([start, scored + 1, stop + 1])).tolist()
            for turn in one.answers:
                low, high = max(first, turn.start), min(end, turn.stop)
                if low < high:
                    found.append((one.document[begin:high], low - begin))
        return found
