"""Base class of variants whose layers belong to several other variants (the members)."""

from __future__ import annotations

from typing import Any

import torch

from variants.base.info import Caps, Complexity, Info
from variants.base.mixer import SequenceMixer, SlotSpec, Variant
from variants.base.scheduled import scheduled_dims
from variants.base.work import Dims
from variants.input_schedule import InputSchedule, WholeSequence


def common_schedule(slots: tuple[SlotSpec[SequenceMixer], ...]) -> InputSchedule:
    """The input schedule of all members: the one that some members require, or whole sequences.

    Raises ValueError, in one line, if members require different schedules or do not support the common one.
    """
    needs = [(slot.name, slot.layer.input_schedule(slot.config)) for slot in slots]
    own = [(name, schedule) for name, schedule in needs if schedule != WholeSequence()]
    for name, schedule in own[1:]:
        first, required = own[0]
        if schedule != required:
            raise ValueError(f"{first} needs {required} and {name} needs {schedule}; allowed is one for all")
    schedule = own[0][1] if own else WholeSequence()
    for slot in slots:
        reason = None if slot.layer.info.caps.stateful else schedule.stateless_unsupported()
        if reason:
            raise ValueError(f"{own[0][0]} needs {schedule}, but {slot.name} {reason}")
    return schedule


class Mixture(Variant):
    """A variant with several members, which are assigned to the layers from the lowest on.

    A member that requires no input schedule uses that of the other members. For example, dense attention in
    a mixture with Transformer-XL reads only its own segment.
    """

    @classmethod
    def distinct(cls, config: Any) -> tuple[SlotSpec[SequenceMixer], ...]:
        """The members without repetition, in order."""
        return tuple(dict.fromkeys(cls.mixers(config)))

    @classmethod
    def members(cls, config: Any) -> tuple[str, ...]:
        """The names of the members."""
        return tuple(slot.name for slot in cls.distinct(config))

    @classmethod
    def input_schedule(cls, config: Any) -> InputSchedule:
        """The common schedule of the members."""
        return common_schedule(cls.distinct(config))

    @classmethod
    def info_for(cls, config: Any) -> Info:
        """The capabilities that all members have, and the largest exponents of any member."""
        infos = [slot.layer.info_for(slot.config) for slot in cls.distinct(config)]
        claims = [info.complexity for info in infos]
        surveys = [claim.survey for claim in claims]
        caps = [info.caps for info in infos]
        return Info(
            paper="; ".join(dict.fromkeys(info.paper for info in infos)),
            family="mixture",
            complexity=Complexity(
                time=max(claim.time for claim in claims),
                memory=max(claim.memory for claim in claims),
                formula=" + ".join(dict.fromkeys(claim.formula for claim in claims)),
                source="; ".join(dict.fromkeys(claim.source for claim in claims)),
                survey=max(filter(None, surveys)) if all(surveys) else None,
            ),
            caps=Caps(
                causal=all(cap.causal for cap in caps),
                bidirectional=all(cap.bidirectional for cap in caps),
                stateful=any(cap.stateful for cap in caps),
                exact=all(cap.exact for cap in caps) and cls.input_schedule(config) == WholeSequence(),
                stochastic=any(cap.stochastic for cap in caps),
                fixed_length=any(cap.fixed_length for cap in caps),
            ),
        )

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """The reason of the first member that has one."""
        reasons = (
            f"{slot.name}: {reason}"
            for slot in cls.distinct(config)
            if (reason := slot.layer.no_form(slot.config, causal=causal))
        )
        return next(reasons, None)

    @classmethod
    def unsupported(cls, config: Any, dims: Dims, *, causal: bool) -> str | None:
        """The reason of the first member that has one, for the windows of the input schedule."""
        if reason := dims.unusable():
            return reason
        schedule = cls.input_schedule(config)
        for slot in cls.distinct(config):
            layer_dims = scheduled_dims(slot.layer, schedule, dims)
            if reason := slot.layer.unsupported(slot.config, layer_dims, causal=causal):
                return f"{slot.name}: {reason}"
        return None

    @classmethod
    def missing(cls, config: Any, dims: Dims, *, device: torch.device, dtype: torch.dtype) -> str | None:
        """The reason of the first member that has one."""
        for slot in cls.distinct(config):
            if reason := slot.layer.missing(slot.config, dims, device=device, dtype=dtype):
                return f"{slot.name}: {reason}"
        return None
