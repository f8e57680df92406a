"""Variants whose layers differ: what holds for the whole follows from the members."""

from __future__ import annotations

from typing import Any

import torch

from variants.base.fed import dims_fed
from variants.base.info import Caps, Complexity, Info
from variants.base.mixer import SequenceMixer, SlotSpec, Variant
from variants.base.work import Dims
from variants.input_schedule import InputSchedule, Whole


def common_schedule(slots: tuple[SlotSpec[SequenceMixer], ...]) -> InputSchedule:
    """The input schedule that all members can be fed by: the one that some need, or whole sequences.

    Raises ValueError, in one line, for members that need different ones or cannot be fed so.
    """
    needs = [(slot.name, slot.layer.input_schedule(slot.config)) for slot in slots]
    own = [(name, schedule) for name, schedule in needs if schedule != Whole()]
    for name, schedule in own[1:]:
        first, wanted = own[0]
        if schedule != wanted:
            raise ValueError(f"{first} is fed in {wanted} and {name} in {schedule}; allowed is one for all")
    schedule = own[0][1] if own else Whole()
    for slot in slots:
        reason = None if slot.layer.info.caps.stateful else schedule.stateless_unsupported()
        if reason:
            raise ValueError(f"{own[0][0]} is fed in {schedule}, but {slot.name} {reason}")
    return schedule


class Mixture(Variant):
    """A variant of several members, one after the other from the lowest layer on.

    A member that needs no input schedule of its own is fed by that of the others: dense attention beside
    Transformer-XL reads its segment alone.
    """

    @classmethod
    def distinct(cls, config: Any) -> tuple[SlotSpec[SequenceMixer], ...]:
        """The members without repetition, in their order."""
        return tuple(dict.fromkeys(cls.mixers(config)))

    @classmethod
    def members(cls, config: Any) -> tuple[str, ...]:
        """Those of its slots."""
        return tuple(slot.name for slot in cls.distinct(config))

    @classmethod
    def input_schedule(cls, config: Any) -> InputSchedule:
        """The members' common one."""
        return common_schedule(cls.distinct(config))

    @classmethod
    def info_for(cls, config: Any) -> Info:
        """What all members can do, and the growth of the most expensive one."""
        known = [slot.layer.info_for(slot.config) for slot in cls.distinct(config)]
        claims = [info.complexity for info in known]
        surveys = [claim.survey for claim in claims]
        caps = [info.caps for info in known]
        return Info(
            paper="; ".join(dict.fromkeys(info.paper for info in known)),
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
                exact=all(cap.exact for cap in caps) and cls.input_schedule(config) == Whole(),
                stochastic=any(cap.stochastic for cap in caps),
                fixed_length=any(cap.fixed_length for cap in caps),
            ),
        )

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """The first member's reason that has one."""
        found = (
            f"{slot.name}: {reason}"
            for slot in cls.distinct(config)
            if (reason := slot.layer.no_form(slot.config, causal=causal))
        )
        return next(found, None)

    @classmethod
    def unsupported(cls, config: Any, dims: Dims, *, causal: bool) -> str | None:
        """The first member's reason that has one, at the sizes that it is fed."""
        if reason := dims.unusable():
            return reason
        schedule = cls.input_schedule(config)
        for slot in cls.distinct(config):
            fed = dims_fed(slot.layer, schedule, dims)
            if reason := slot.layer.unsupported(slot.config, fed, causal=causal):
                return f"{slot.name}: {reason}"
        return None

    @classmethod
    def missing(cls, config: Any, dims: Dims, *, device: torch.device, dtype: torch.dtype) -> str | None:
        """The first member's reason that has one."""
        for slot in cls.distinct(config):
            if reason := slot.layer.missing(slot.config, dims, device=device, dtype=dtype):
                return f"{slot.name}: {reason}"
        return None
