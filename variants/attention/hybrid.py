"""A mixture of variants: each layer is a layer of another variant, in a repeating order.

Models with both dense and local layers are common. For example, GPT-3 alternates dense and locally banded
layers (Brown 2020, arXiv:2005.14165, §2.1); every sixth layer of Gemma 3 is global (arXiv:2503.19786, §2).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, get_origin, get_type_hints

import variants
from variants.base import Mixture, SequenceMixer, SlotSpec, VariantConfig
from variants.base.mixture import common_schedule

RECIPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # every second layer reads all tokens, the lowest a window (arXiv:2408.00118, §2)
        "gemma2": ("longformer(window=4096)", "dense"),
        # five layers with windows, then one that reads all tokens (arXiv:2503.19786, §2)
        "gemma3": ("5xlongformer(window=1024)", "dense"),
        # windows and all tokens in turn, with learnt sinks (arXiv:2508.10925)
        "gpt_oss": ("learnt_sink(window=128)", "learnt_sink"),
        # three layers of Kimi Delta Attention, then one of latent attention (arXiv:2510.26692)
        "kimi_linear": ("3xkda", "latent_attention"),
        # seven layers of lightning attention, then one of softmax attention (arXiv:2501.08313)
        "minimax_01": ("7xlightning", "dense"),
        # three layers with the gated delta rule, then one of softmax attention with a gate
        "qwen3_next": ("3xgated_delta_net", "gated_attention"),
    }
)
"""Mixtures of published models, by names that may stand in place of layers. Only the order of the layers and
their windows are those of the models, not positions, normalisations and feed-forward layers."""
MOST_TIMES = 1024
"""Times that an entry repeats a layer."""
_TIMES = re.compile(r"\s*(\d+)x(?=[A-Za-z_])(.*)", re.DOTALL)
_MEMBER = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_ARGUMENT = re.compile(r"\s*(\w+)\s*=\s*(\[[^\]]*\]|[^,\[\]]*?)\s*(?:,|$)")


@dataclass(frozen=True, kw_only=True)
class HybridConfig(VariantConfig):
    """Knobs of a mixture."""

    layers: tuple[str, ...] = ("longformer", "dense")
    """Variants of the layers, from the lowest layer on; a deeper model repeats them. Knobs that differ from
    their defaults are given in parentheses: longformer(window=512). 3xlongformer are three such layers, and
    gemma2 and gemma3 the layers of these models. Records have every layer by itself."""

    def __post_init__(self) -> None:
        self.require("layers", bool(self.layers), "a list of one or more variants")
        object.__setattr__(self, "layers", tuple(map(_canonical, self.slots)))
        try:
            common_schedule(self.slots)
        except ValueError as error:
            raise ValueError(f"layers={list(self.layers)}: {error}") from None

    @cached_property
    def slots(self) -> tuple[SlotSpec[SequenceMixer], ...]:
        """The members. Raises ValueError for a variant or a knob that does not exist."""
        return tuple(map(_member, _single(self.layers)))


class Hybrid(Mixture):
    """Layers of other variants, each with the mathematics, cost, state and leak of its variant."""

    Config = HybridConfig

    @classmethod
    def mixers(cls, config: HybridConfig) -> tuple[SlotSpec[SequenceMixer], ...]:
        """The members."""
        return config.slots


def _single(entries: Iterable[str]) -> Iterator[str]:
    """Yield the text of each layer of entries such as `3xlongformer` and `gemma3`."""
    for entry in entries:
        match = _TIMES.fullmatch(entry)
        times, layer = (int(match[1]), match[2].strip()) if match else (1, entry.strip())
        if not 1 <= times <= MOST_TIMES:
            raise ValueError(f"layers: {entry}: allowed are 1x to {MOST_TIMES:,}x")
        recipe = RECIPES.get(layer)
        layers = (layer,) if recipe is None else tuple(_single(recipe))
        for _ in range(times):
            yield from layers


def _member(text: str) -> SlotSpec[SequenceMixer]:
    """`longformer(window=512)` as a slot."""
    match = _MEMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"layers: {text!r} is not a layer; write it like dense or longformer(window=512)")
    name, arguments = match[1], match[2] or ""
    try:
        variant = variants.load(name)
    except variants.UnknownVariant as error:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"layers: {error}; models are {', '.join(RECIPES)}{hint}") from None
    if not issubclass(variant, SequenceMixer):
        raise ValueError(f"layers: {name} is itself a mixture; allowed are variants with one kind of layer")
    try:
        return SlotSpec(name, variant, variant.Config.of(_knobs(name, variant.Config, arguments)))
    except ValueError as error:
        raise ValueError(f"layers: {text}: {error}") from None


def _knobs(name: str, config_class: type[VariantConfig], arguments: str) -> dict[str, Any]:
    """Parse the text `window=[64,128], impl=flex` to values of the fields of a config class."""
    hints, known = get_type_hints(config_class), [field.name for field in fields(config_class)]
    values: dict[str, Any] = {}
    at = 0
    while arguments[at:].strip():
        match = _ARGUMENT.match(arguments, at)
        if match is None:
            raise ValueError(f"{arguments[at:].strip()!r} is not a knob; write it like window=512")
        knob, text = match[1], match[2]
        if knob not in known:
            similar = difflib.get_close_matches(knob, known, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise ValueError(f"{knob}: {name} has no such knob; there are {', '.join(known)}{hint}")
        if knob in values:
            raise ValueError(f"{knob}: given twice")
        values[knob] = _value(text, is_list=get_origin(hints[knob]) is tuple, is_text=hints[knob] is str)
        at = match.end()
    return values


def _value(text: str, *, is_list: bool, is_text: bool) -> Any:
    """Parse the value of a knob."""
    if is_list:
        inside = text.removeprefix("[").removesuffix("]")
        return [_value(part, is_list=False, is_text=is_text) for part in inside.split(",") if part.strip()]
    text = text.strip().strip("'\"")
    words: dict[str, Any] = {"null": None, "true": True, "false": False}
    if is_text or text in words:
        return words.get(text, text) if not is_text else text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _canonical(slot: SlotSpec[SequenceMixer]) -> str:
    """The canonical text of a member: its name, and the knobs that differ from their defaults."""
    defaults = type(slot.config)().as_dict()
    knobs = [f"{knob}={_text(value)}" for knob, value in slot.params.items() if value != defaults[knob]]
    return f"{slot.name}({','.join(knobs)})" if knobs else slot.name


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]" if len(value) != 1 else _text(value[0])
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
