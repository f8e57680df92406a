"""Initial weights of the model.

GPT-2's initialisation: normal with standard deviation 0.02, divided by √(2·visits) for projections that write
to the residual stream; a stack visits each of its blocks once. GPT-2 has this deviation at a width of 768; at
other widths it is multiplied by √(768 / C), so that projections have the same variance at every width. With
0.02 at a width of 64, attention scores are nearly equal at first and models learn more slowly. Frozen
parameters keep the values that their layer gives them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

GPT2_STD, GPT2_WIDTH = 0.02, 768
"""Standard deviation of GPT-2's initial weights, and the width of its smallest model."""


def initial_std(d_model: int) -> float:
    """Return the standard deviation of the initial weights of a model of this width."""
    return GPT2_STD * math.sqrt(GPT2_WIDTH / d_model)


def draw(model: nn.Module, *, d_model: int, visits: int) -> None:
    """Draw the weights of all linear maps and embeddings of a model that makes so many visits of blocks."""
    std = initial_std(d_model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.requires_grad:
            nn.init.normal_(module.weight, std=std)
    for name, parameter in model.named_parameters():
        if name.endswith("out.weight") and parameter.requires_grad:  # writes to the residual stream
            nn.init.normal_(parameter, std=std / (2 * visits) ** 0.5)


def draw_factors(tables: Iterable[nn.Embedding | nn.Linear], maps: Iterable[nn.Linear], d_model: int) -> None:
    """Draw again the factors of embeddings: tables with a row for each token, and their maps from and to
    d_model channels. The product has about the variance of an embedding without factors."""
    for table in tables:
        nn.init.normal_(table.weight, std=initial_std(table.weight.shape[1]))
    for factor in maps:
        nn.init.normal_(factor.weight, std=d_model**-0.5)
