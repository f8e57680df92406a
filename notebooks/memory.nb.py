# %% [markdown]
# # Memory: what fills it, and what fits
#
# Out of memory is how most long-context experiments end. This notebook answers three questions. What is the peak of a training step made of? What does each way of saving activations (`activations=`) take off it, and at what price? And how long a sequence fits into the memory you have?
#
# The first part reads records; `RESULTS` names another experiment's folder. The others *predict*, on any machine, in seconds: the step runs on fake tensors, which have shapes and no numbers, while every allocation is counted. It is what `measure=plan` does.
#
# ## What the peak is made of

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd

from bench.records import load
from bench.report.figures.canvas import human_axis, lengths_axis, look
from bench.report.figures.style import strategy_styles, variant_rank
from bench.report.sections.memory.plots import COLOURS
from bench.report.text import units

PARTS = {
    "param_bytes": "parameters",
    "optimizer_bytes": "optimizer",
    "peak_grad_bytes": "gradients",
    "peak_activation_bytes": "activations",
    "peak_workspace_bytes": "workspace",
}

records = load(os.environ.get("RESULTS", "../results/reference-cpu"))
measured = records[(records["status"] == "ok") & records["peak_activation_bytes"].notna()]
largest = measured[["depth", "seq_len"]].apply(tuple, axis=1).max()
where = (
    (measured["depth"] == largest[0])
    & (measured["seq_len"] == largest[1])
    & (measured["activations"] == "keep")
)
parts = measured[where].groupby(["variant", "objective"])[list(COLOURS)].median()
parts = parts.loc[sorted(parts.index, key=lambda key: variant_rank(key[0]), reverse=True)]

with look():
    figure, panel = plt.subplots(figsize=(7.6, 0.33 * len(parts) + 1.4))
    left = pd.Series(0.0, parts.index)
    names = [name if objective == "clm" else f"{name} ({objective})" for name, objective in parts.index]
    for part, colour in COLOURS.items():
        label = PARTS[part]
        panel.barh(names, parts[part] / 2**20, left=left / 2**20, color=colour, label=label)
        left += parts[part]
    panel.set(
        xlabel="MiB at the peak of a step",
        title=f"length {units.length(largest[1])}, depth {largest[0]}, activations=keep",
    )
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    plt.show()

# %% [markdown]
# *Parameters*, *optimizer* (two moments in Adam) and *gradients* depend on the model alone: no attention variant changes them. What grows with the length is *activations*, which the forward pass leaves for the backward pass, and *workspace*, what operations need while they run. Two things stand out in the reference run. Fused dense attention stores no length × length matrix, so exact attention needs no more memory than a window does. And variants that train segment by segment (Transformer-XL, Compressive Transformer) hold one segment's activations at a time, whatever the length.
#
# Can a prediction be trusted? Every record has both figures.

# %%
both = measured.dropna(subset=["peak_bytes_predicted"])
error = (both["peak_bytes_predicted"] / both["peak_bytes"] - 1).abs()
print(f"{len(both)} cells: median error {units.percent(error.median())}, worst {units.percent(error.max())}")

# %% [markdown]
# ## What the ways of saving activations save
#
# | `activations=` | what is kept from the forward pass | what the backward pass does for it |
# |---|---|---|
# | `keep` | everything | nothing |
# | `checkpoint` | each block's input ([Chen 2016](https://arxiv.org/abs/1604.06174)) | runs every block's forward again |
# | `sqrt` | the input of every √depth-th block | runs segments of √depth blocks again |
# | `selective` | products of matrices and attention, not what is cheap between them | computes the cheap rest again |
# | `reversible` | the last block's output alone ([Gomez 2017](https://arxiv.org/abs/1707.04585)) | rebuilds each block's input from its output |
# | `offload` | everything, in the host's memory | copies it back; saves on an accelerator alone |
#
# So with `keep` what is saved grows with the depth, with `checkpoint` it grows with a smaller factor, and with `reversible` it does not grow. (What `sqrt` computes again, a whole segment, counts as workspace, not as saved.) The following takes the same words as the command line does (`python -m bench measure=plan model=small …`).

# %%
from dataclasses import replace

from hydra import compose, initialize_config_dir

from bench import CONFIGS
from bench.config.parse import parse
from bench.measure.predict import Plan

STRATEGIES = ["keep", "checkpoint", "sqrt", "selective", "reversible"]


def cell(*overrides):
    """One cell, by the words that the command line takes."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["measure=plan", "device=cpu", *overrides])).spec


base = cell("variant=dense", "model=small", "seq_len=4096", "depth=1")
steps = {
    (strategy, depth): Plan(replace(base, activations=strategy, depth=depth)).predict()
    for strategy in STRATEGIES
    for depth in (2, 4, 8)
}
plan = pd.DataFrame(
    [
        {
            "strategy": strategy,
            "depth": depth,
            "peak_bytes": step.peak_bytes,
            "saved_bytes": step.at_peak["activations"],
            "flops": step.flops_step,
        }
        for (strategy, depth), step in steps.items()
    ]
)
title = f"dense, length {units.length(base.seq_len)}, width {base.model.d_model}, batch 1, float32: predicted"

with look():
    figure, panels = plt.subplots(1, 2, figsize=(9.4, 3.6))
    for panel, column, label in zip(
        panels, ("peak_bytes", "saved_bytes"), ("peak of a step", "of it, saved activations"), strict=True
    ):
        for strategy, style in strategy_styles(STRATEGIES).items():
            line = plan[plan["strategy"] == strategy]
            panel.plot(line["depth"], line[column], color=style.colour, marker=style.marker, label=strategy)
        panel.set(xscale="log", yscale="log", xlabel="depth", ylabel=label)
        lengths_axis(panel.xaxis, plan["depth"])
        human_axis(panel.yaxis, *panel.get_ylim(), units.size, binary=True)
    figure.suptitle(title, fontsize=9)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    plt.show()

# %% [markdown]
# ## What they cost
#
# Recomputation is work: a plain step is about one part forward and two backward, so running every forward again makes 4/3 of it. `reversible` runs each forward again too. What is left of the peak is as telling: at depth 8 the optimiser and the parameters, which no strategy touches, are a large part of it.

# %%
deep = plan[plan["depth"] == plan["depth"].max()].set_index("strategy").loc[STRATEGIES]
pd.DataFrame(
    {
        "peak": deep["peak_bytes"].map(units.size),
        "peak / keep": (deep["peak_bytes"] / deep.loc["keep", "peak_bytes"]).map(units.ratio),
        "work / keep": (deep["flops"] / deep.loc["keep", "flops"]).map(units.ratio),
    }
)

# %% [markdown]
# ## What fits
#
# The longest sequence whose training step fits into 8 GiB, found with a handful of predictions each. Swap in your variant, model and budget; `make plan GPU_MEM=24GiB` does it for every variant and writes a report.

# %%
BUDGET = 8 * 2**30

spec = cell("variant=dense", "model=small", "depth=4")
fits = {
    strategy: Plan(replace(spec, activations=strategy)).longest_seq_len(BUDGET)
    for strategy in ("keep", "checkpoint", "reversible")
}
print(f"longest sequence in {units.size(BUDGET)}: dense, width 256, depth 4, batch 1, float32")
pd.DataFrame(
    {"tokens": pd.Series(fits).map(units.length), "/ keep": (pd.Series(fits) / fits["keep"]).map(units.ratio)}
)

# %% [markdown]
# The kernel has a word in it too. `impl=naive` is the same attention, which stores its scores, length × length a head:

# %%
kernels = {
    impl: Plan(
        cell("variant=dense", f"variant.impl={impl}", "model=small", "depth=4", "seq_len=4096")
    ).predict()
    for impl in ("naive", "sdpa")
}
print("4,096 tokens:", ", ".join(f"{impl} {units.size(step.peak_bytes)}" for impl, step in kernels.items()))

# %% [markdown]
# So the order in which to look for memory is: first a kernel that does not store the scores; then a way of saving activations, which is worth a factor of several in length, the more the deeper the model; and only then another variant, which has to be chosen for its *time*. Predictions leave out what the device's libraries hold, and fragmentation: leave a margin of a tenth.
