"""Decoding with a model: a prompt, then tokens one by one or in blocks.

Shapes: B batch, n tokens of a step, C channels, V vocabulary.

The input schedule decides which states there are. Usually there is one for each visit of a block. A layer
without memory that reads segments begins anew with each of them. Chunks are sequences of their own: each open
chunk has its states, and overlapping chunks run side by side.
"""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from bench.model.language_model import LanguageModel
from variants.base import Clock, Context, DecodingState, SequenceMixer, Workload
from variants.input_schedule import InputSchedule, require_tokens


def no_decoding(model: LanguageModel) -> str | None:
    """Return why sequences cannot be decoded with a model, or None."""
    layers = model.distinct_layers()
    for name, layer in layers:
        if reason := layer.no_decoding(layer.config):
            return f"{name} {reason}" if len(layers) > 1 else reason
    stack = model.spec.depth
    if reason := stack.layer.no_decoding(stack.config):
        return f"stack={stack.name} {reason}"
    for slot in dict.fromkeys(layer.feed_forward for layer in model.spec.layers):
        if reason := slot.layer.reads_others(slot.config):
            return f"{slot.name} {reason}"
    return None


def open_windows(schedule: InputSchedule, max_len: int) -> tuple[int, int]:
    """Return how many windows are open at a time, at most, and their length."""
    if schedule.separate is None:
        return 1, max_len
    length, stride = schedule.separate
    return min(-(-length // stride), -(-max_len // stride)), min(max_len, length)


def layer_length(schedule: InputSchedule, layer: SequenceMixer, length: int) -> int:
    """Return how many tokens of a window of this length a layer reads before it begins anew."""
    if layer.info.caps.stateful or schedule.restart is None:
        return length
    return min(length, schedule.restart)


def decoding_bytes(model: LanguageModel, work: Workload) -> int:
    """Return the bytes of the states of a decoder for work.batch_size sequences of work.seq_len tokens."""
    count, length = open_windows(model.input_schedule, work.seq_len)
    sizes = [
        block.mixer.decoding_bytes(
            replace(work, seq_len=layer_length(model.input_schedule, block.mixer, length))
        )
        for block in model.visits
    ]
    return count * sum(sizes)


class _Window:
    """The states of all visits for one window of the input schedule."""

    def __init__(self, model: LanguageModel, batch_size: int, length: int, dtype: torch.dtype) -> None:
        self.start: int | None = None
        """Position in the sequence of its first token; None: it has not begun."""
        self.clock, self.segment_clock = Clock(), Clock()
        self.states: list[DecodingState] = []
        for block in model.visits:
            own_length = layer_length(model.input_schedule, block.mixer, length)
            clock = self.clock if own_length == length else self.segment_clock
            self.states.append(block.mixer.init_state(batch_size, own_length, clock=clock, dtype=dtype))

    def begin(self, position: int) -> None:
        """Begin anew at a position of the sequence."""
        self.start = position
        self._restart(self.clock)
        self._restart(self.segment_clock)

    def begin_segment(self) -> None:
        """The layers without memory begin anew."""
        self._restart(self.segment_clock)

    def _restart(self, clock: Clock) -> None:
        clock.restart()
        for state in self.states:
            if state.clock is clock:
                state.reset()

    def advance(self, tokens: int) -> None:
        """Go on, after all layers have read these tokens."""
        self.clock.advance(tokens)
        self.segment_clock.advance(tokens)


class Decoder:
    """Sequences that a model reads. All memory is allocated at the start, for `max_len` tokens."""

    def __init__(self, model: LanguageModel, batch_size: int, max_len: int) -> None:
        """Raises ValueError if the model cannot be decoded."""
        if reason := no_decoding(model):
            raise ValueError(reason)
        self.model, self.max_len = model, max_len
        self.schedule = model.input_schedule
        self.position = 0
        dtype = model.embedding.weight.dtype if model.dtype == torch.float32 else model.dtype
        count, length = open_windows(self.schedule, max_len)
        self.windows = [_Window(model, batch_size, length, dtype) for _ in range(count)]
        self.windows[0].begin(0)

    def restart(self) -> None:
        """Forget all tokens."""
        self.position = 0
        for window in self.windows:
            window.start = None
        self.windows[0].begin(0)

    def copy_from(self, other: Decoder) -> None:
        """Take over the tokens of a decoder of one sequence, in every sequence."""
        self.position = other.position
        for window, single in zip(self.windows, other.windows, strict=True):
            window.start = single.start
            window.clock.position = single.clock.position
            window.segment_clock.position = single.segment_clock.position
            for state, one in zip(window.states, single.states, strict=True):
                state.copy_from(one)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for window in self.windows for state in window.states)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens (B, n) → logits (B, V) of the token after the last. A prompt is read so too.

        Raises ValueError without a token, or if there is no room for so many.
        """
        self._require_room(tokens)
        skipped = self._without_influence(tokens.shape[1])
        if skipped:
            self.position, self.windows[0].start = skipped, None  # no open window has read what is skipped
        *earlier, last = self._split(tokens[:, skipped:])
        for piece in earlier:
            self._read_piece(piece)
        return self._logits(self._read_piece(last)[:, -1:])[:, 0]

    @torch.no_grad()
    def read_all(self, tokens: Tensor) -> Tensor:
        """Read the next tokens (B, n) → logits (B, n, V) of the token after each of them."""
        self._require_room(tokens)
        return self._logits(torch.cat([self._read_piece(piece) for piece in self._split(tokens)], dim=1))

    def read_for_cost(self, tokens: Tensor) -> None:
        """`read` where only shapes count, as on fake tensors: segments that would repeat the cost of the one
        before are skipped."""
        if self.schedule.restart is None:
            self.read(tokens)
            return
        end, before = self.position + tokens.shape[1], None
        while pieces := self._pieces(end - self.position):
            self.read(tokens[:, : pieces[0]])
            counts = [state.counts() for window in self.windows for state in window.states]
            if counts == before:
                repeated = sum(pieces[1:-1])
                self.position += repeated
                self.windows[0].advance(repeated)
            before = counts

    def _logits(self, x: Tensor) -> Tensor:
        with self._autocast(x):
            logits = self.model.read_out(x)
        return logits.float() if logits.dtype != torch.float64 else logits

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, self.model.dtype, enabled=self.model.dtype != torch.float32)

    def _split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The pieces of tokens (B, n) that the input schedule feeds at once."""
        pieces: tuple[Tensor, ...] = tokens.split(self._pieces(tokens.shape[1]), dim=1)
        return pieces

    def _read_piece(self, piece: Tensor) -> Tensor:
        """Read a piece (B, n) → hidden states (B, n, C)."""
        with self._autocast(piece):
            self._begin_windows()
            embedded = self.model.embed(piece)
            outputs = [self._run(window, embedded) for window in self._open()]
        self.position += piece.shape[1]
        return outputs[0]

    def _require_room(self, tokens: Tensor) -> None:
        require_tokens(tokens)
        if self.position + tokens.shape[1] > self.max_len:
            after = f"{tokens.shape[1]} tokens after {self.position}"
            raise ValueError(f"{after}: the decoder was made for at most {self.max_len}")

    def _without_influence(self, tokens: int) -> int:
        """Number of tokens at the start of a prompt that no window reads which is open at its end."""
        if self.position or self.schedule.separate is None:
            return 0
        length, stride = self.schedule.separate
        return -(-max(0, tokens - length) // stride) * stride

    def _pieces(self, tokens: int) -> list[int]:
        """Numbers of tokens up to the borders of windows and segments."""
        border = self.schedule.separate[1] if self.schedule.separate else self.schedule.restart
        if border is None:
            return [tokens]
        if not tokens:
            return []
        end = self.position + tokens
        stops = [*range((self.position // border + 1) * border, end, border), end]
        return [stop - start for start, stop in zip([self.position, *stops], stops, strict=False)]

    def _begin_windows(self) -> None:
        if self.schedule.separate and self.position % self.schedule.separate[1] == 0:
            self.windows[self.position // self.schedule.separate[1] % len(self.windows)].begin(self.position)
        elif self.schedule.restart and self.position % self.schedule.restart == 0:
            self.windows[0].begin_segment()

    def _open(self) -> list[_Window]:
        """The windows that read the next token, the oldest first: its output counts."""
        length = self.schedule.separate[0] if self.schedule.separate else self.max_len
        begun = [(window.start, window) for window in self.windows if window.start is not None]
        return [
            window for start, window in sorted(begun, key=itemgetter(0)) if self.position < start + length
        ]

    def _run(self, window: _Window, x: Tensor) -> Tensor:
        y = self.model.run_visits(x, list(window.states), Context(causal=True)).y
        window.advance(x.shape[1])
        return y
