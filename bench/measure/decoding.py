"""What a model costs that generates: the prompt, and each token after it.

The same code runs on real tensors and, for a prediction, on fake ones. Weights are those of a new model, and
tokens are any: no cost depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.config.spec import CellSpec
from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from bench.measure.predict import MAX_SEQUENCES, build_model, largest
from bench.measure.timing import synchronize
from bench.model.decode import Decoder


@dataclass(frozen=True, kw_only=True)
class DecodingFigures:
    """Of one model at one position. Counts are of the second token after the prompt, the peak of both."""

    weight_bytes: int
    state_bytes: int
    """Bytes of all states, which are allocated at the start."""
    prefill_peak_bytes: int
    decode_peak_bytes: int
    launches: int
    bytes_moved: int
    flops: int


class Decoding:
    """A model that has read a prompt, and the figures of the next token."""

    def __init__(self, spec: CellSpec, device: torch.device, *, room: int, costs_only: bool = False) -> None:
        """Read a prompt of spec.seq_len tokens; `room` is for how many more tokens there is memory.

        `costs_only`: the tensors are fake, so what repeats the cost of something before is left out.

        Raises ValueError if the model cannot be decoded.
        """
        self.spec, self.device, self.room = spec, device, room
        self.costs_only = costs_only
        storage = LiveStorage()
        with storage:
            with device:
                self.model = build_model(replace(spec, seq_len=spec.seq_len + room)).eval()
            self.decoder = Decoder(self.model, spec.batch_size, spec.seq_len + room)
            self._begin(storage)
            self.prefill()
            prefill_peak = self._peak(storage)
            token = self.tokens()
            self._begin(storage)
            self.decoder.read(token)  # may end a segment, which only few tokens do
            with CountFlops() as counter:
                self.decoder.read(token)
            decode_peak = self._peak(storage)
        counts = counter.counts
        self.figures = DecodingFigures(
            weight_bytes=sum(p.nbytes for p in self.model.parameters()),
            state_bytes=self.decoder.nbytes,
            prefill_peak_bytes=prefill_peak,
            decode_peak_bytes=decode_peak,
            launches=counts.launches,
            bytes_moved=counts.bytes_moved,
            flops=counts.flops,
        )

    def _begin(self, storage: LiveStorage) -> None:
        storage.reset_peak()
        if self.device.type != "cpu":
            synchronize(self.device)
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)

    def _peak(self, storage: LiveStorage) -> int:
        if self.device.type == "cpu":
            return storage.peak
        synchronize(self.device)
        return int(torch.get_device_module(self.device).max_memory_allocated(self.device))

    def prefill(self) -> None:
        """Read the prompt, from the start."""
        self.decoder.restart()
        read = self.decoder.read_for_cost if self.costs_only else self.decoder.read
        read(self.tokens(self.spec.seq_len))

    def tokens(self, count: int = 1) -> Tensor:
        """Tokens (B, count) to read."""
        return torch.zeros(self.spec.batch_size, count, dtype=torch.long, device=self.device)


def predicted(spec: CellSpec, *, room: int) -> DecodingFigures:
    """Return the figures without the device and without memory, by the CPU's code paths."""
    with FakeTensorMode():
        return Decoding(spec, torch.device("cpu"), room=room, costs_only=True).figures


def largest_batch(spec: CellSpec, usable: int, *, room: int) -> int:
    """Return the most sequences whose states fit into `usable` bytes, with the model and a step; 0: none."""

    def peak(batch_size: int) -> int:
        return predicted(replace(spec, batch_size=batch_size), room=room).decode_peak_bytes

    return largest(peak, usable, MAX_SEQUENCES)
