"""Interfaces of the slots of a model: sequence mixers, feed-forward layers and depth schedules."""

from variants.base.decoding import Clock, DecodingState
from variants.base.depth import DepthConfig, DepthSchedule, Path, PathOut, RunVisits, Visit, VisitOut
from variants.base.feed_forward import ExpertLoad, FeedForward, FeedForwardConfig, FFOut, HasExperts
from variants.base.impl import Impl
from variants.base.info import Caps, Complexity, Info, PositionScheme
from variants.base.mixer import MixerOut, SequenceMixer, SlotSpec, Variant, VariantConfig
from variants.base.mixture import Mixture
from variants.base.protocols import (
    AuxiliaryLoss,
    EstimatesSoftmax,
    ExposesScores,
    HasMask,
    HasMemory,
    KnownLeak,
    MakesChoices,
    TiesParameters,
    UpdatesAfterStep,
    known_leak,
    tie,
)
from variants.base.scheduled import (
    scheduled_cost,
    scheduled_dims,
    scheduled_reference,
    scheduled_state_bytes,
    segment_mask,
    sequence_mask,
)
from variants.base.work import TOKENWISE, Context, Cost, Dims, Workload

__all__ = [
    "TOKENWISE",
    "AuxiliaryLoss",
    "Caps",
    "Clock",
    "Complexity",
    "Context",
    "Cost",
    "DecodingState",
    "DepthConfig",
    "DepthSchedule",
    "Dims",
    "EstimatesSoftmax",
    "ExpertLoad",
    "ExposesScores",
    "FFOut",
    "FeedForward",
    "FeedForwardConfig",
    "HasExperts",
    "HasMask",
    "HasMemory",
    "Impl",
    "Info",
    "KnownLeak",
    "MakesChoices",
    "MixerOut",
    "Mixture",
    "Path",
    "PathOut",
    "PositionScheme",
    "RunVisits",
    "SequenceMixer",
    "SlotSpec",
    "TiesParameters",
    "UpdatesAfterStep",
    "Variant",
    "VariantConfig",
    "Visit",
    "VisitOut",
    "Workload",
    "known_leak",
    "scheduled_cost",
    "scheduled_dims",
    "scheduled_reference",
    "scheduled_state_bytes",
    "segment_mask",
    "sequence_mask",
    "tie",
]
