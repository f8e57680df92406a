"""The layers of a mixture, read from the texts that its records have: `longformer(window=64)`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import variants

_KNOB = re.compile(r"(\w+)=(\[[^\]]*\]|[^,\[\]()]*)")


def name_of(layer: str) -> str:
    """The variant of a layer's text."""
    return layer.partition("(")[0].strip()


def layers_of(params: Mapping[str, Any], depth: int) -> list[str]:
    """The texts of all layers of a model from the lowest on; empty for a model that is no mixture."""
    period = params.get("layers")
    if not isinstance(period, Sequence) or isinstance(period, str) or not period:
        return []
    return [str(period[place % len(period)]) for place in range(depth)]


def params_of(layer: str) -> dict[str, Any]:
    """The parameters of a layer's variant: those of its text, and the defaults of all others if the variant
    is known here."""
    own = {knob: _value(text) for knob, text in _KNOB.findall(layer.partition("(")[2])}
    try:
        return variants.declared(name_of(layer)).config().as_dict() | own
    except ValueError:
        return own


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
