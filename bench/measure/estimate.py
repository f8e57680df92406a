"""The time of a step on a card that is not at hand, estimated from its launches, bytes and FLOPs.

An eager step takes the longer of two times: the host prepares the step and launches every kernel, and the
card moves the bytes and multiplies. For the 40 cells of the committed round on an H100 (results/h100) the
constants below give the measured times with a root mean square error of 13 %, counted with the code of that
round. Fitted without a variant, the error for that variant's cells is 15 %. The error of single
cells is −28 to +29 %, partly because the cells were measured once, on a virtual machine. So an estimate says
what limits a step and by how much; it does not rank variants that are close.

Only the H100's constants were fitted. Estimates for other cards assume that a card reaches the same shares of
its data sheet, and that the host is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

REACHED_FLOPS_SHARE = 500 / 989
"""Fitted rate of the H100 in bfloat16 as a share of its data sheet."""
REACHED_BYTES_SHARE = 2.4 / 3.35
"""Fitted rate of the H100's memory as a share of its data sheet."""
SECONDS_PER_LAUNCH = 34e-6
"""Fitted for the virtual machine of that H100. A property of the host; without virtualisation about 10 µs."""
SECONDS_PER_STEP = 4e-3
"""Fitted for the same host: work of a step beside launches, such as the optimiser's lists of tensors."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """An accelerator by its data sheet."""

    title: str
    teraflops_per_second: float
    """Of bfloat16 matrix products without sparsity, sums in float32."""
    terabytes_per_second: float
    """Of its memory."""
    seconds_per_launch: float = SECONDS_PER_LAUNCH
    seconds_per_step: float = SECONDS_PER_STEP
    source: str
    """Of both rates."""
    launch_source: str = "fitted on a virtual machine with an H100; assumed for hosts of other cards"

    @property
    def flops_per_second(self) -> float:
        """The rate that a step is assumed to reach."""
        return self.teraflops_per_second * 1e12 * REACHED_FLOPS_SHARE

    @property
    def bytes_per_second(self) -> float:
        """The rate that a step is assumed to reach."""
        return self.terabytes_per_second * 1e12 * REACHED_BYTES_SHARE


CARDS: Mapping[str, Card] = MappingProxyType(
    {
        "h100": Card(
            title="H100 SXM 80 GB",
            teraflops_per_second=989,
            terabytes_per_second=3.35,
            source="NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: 1,979 TFLOP/s with sparsity; 3.35 TB/s",
        ),
        "a100": Card(
            title="A100 SXM 80 GB",
            teraflops_per_second=312,
            terabytes_per_second=2.039,
            source="NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: 312 TFLOP/s; 2,039 GB/s",
        ),
        "rtx4090": Card(
            title="GeForce RTX 4090",
            teraflops_per_second=165.2,
            terabytes_per_second=1.008,
            source="NVIDIA Ada GPU Architecture white paper, appendix A: 165.2 TFLOP/s; 1,008 GB/s",
        ),
        "b200": Card(
            title="B200 SXM 180 GB",
            teraflops_per_second=2250,
            terabytes_per_second=8.0,
            source="NVIDIA Blackwell Architecture Technical Brief, HGX B200: 2.25 PFLOP/s; up to 8 TB/s",
        ),
    }
)
"""By the words of the knob `measure.card`."""


def estimated_seconds(launches: int, bytes_moved: int, flops: int, card: Card) -> float:
    """Return the estimated seconds of work that launches so many kernels, one after the other."""
    device = bytes_moved / card.bytes_per_second + flops / card.flops_per_second
    return max(card.seconds_per_step + launches * card.seconds_per_launch, device)
