"""The interfaces of what fills a model's slots: mixers of tokens, feed-forward layers, depth schedules."""

from variants.base.depth import DepthConfig, DepthSchedule, Visit, VisitOut
from variants.base.fed import cost_fed, dims_fed, mask_fed, reference_fed, state_bytes_fed, whole_mask
from variants.base.feed_forward import FeedForward, FeedForwardConfig, FFOut
from variants.base.impl import Impl
from variants.base.info import Caps, Complexity, Info
from variants.base.mixer import MixerOut, SequenceMixer, SlotSpec, Variant, VariantConfig
from variants.base.mixture import Mixture
from variants.base.protocols import (
    AuxiliaryLoss,
    EstimatesSoftmax,
    ExposesScores,
    HasMask,
    KnownLeak,
    TiesParameters,
    UpdatesAfterStep,
    known_leak,
    tie,
)
from variants.base.work import TOKENWISE, Context, Cost, Dims, Workload

__all__ = [
    "TOKENWISE",
    "AuxiliaryLoss",
    "Caps",
    "Complexity",
    "Context",
    "Cost",
    "DepthConfig",
    "DepthSchedule",
    "Dims",
    "EstimatesSoftmax",
    "ExposesScores",
    "FFOut",
    "FeedForward",
    "FeedForwardConfig",
    "HasMask",
    "Impl",
    "Info",
    "KnownLeak",
    "MixerOut",
    "Mixture",
    "SequenceMixer",
    "SlotSpec",
    "TiesParameters",
    "UpdatesAfterStep",
    "Variant",
    "VariantConfig",
    "Visit",
    "VisitOut",
    "Workload",
    "cost_fed",
    "dims_fed",
    "known_leak",
    "mask_fed",
    "reference_fed",
    "state_bytes_fed",
    "tie",
    "whole_mask",
]
