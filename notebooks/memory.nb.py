# %% [markdown]
# # Memory: the parts of the peak, and the sizes that fit
#
# Most long-context experiments fail because memory runs out. This notebook answers three questions. What are the parts of the peak memory of a training step? How much memory does each strategy for activations (`activations=`) save, and at what cost? How long a sequence fits into a given memory?
#
# The first part reads records; the environment variable `RESULTS` sets another experiment's folder. The other parts *predict*, in seconds and on any machine: the step runs on fake tensors, which have shapes but no numbers, and every allocation is counted. `measure=plan` does the same.
#
# ## The parts of the peak

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
# *Parameters*, *optimizer* (two moments in Adam) and *gradients* do not grow with the length. Variants differ in them a little, because their projections differ, and because not all gradients exist at the moment of the peak. Two parts grow with the length: *activations*, which the forward pass stores for the backward pass, and *workspace*, the memory of operations while they run. The reference run shows two facts. Fused dense attention stores no length × length matrix, so exact attention needs no more memory than a window. Variants that train on one segment after the other (Transformer-XL, Compressive Transformer) hold the activations of only one segment at a time, at every length.
#
# How accurate is a prediction? Every record has both figures.

# %%
both = measured.dropna(subset=["peak_bytes_predicted"])
error = (both["peak_bytes_predicted"] / both["peak_bytes"] - 1).abs()
print(f"{len(both)} cells: median error {units.percent(error.median())}, worst {units.percent(error.max())}")

# %% [markdown]
# ## How much memory each strategy saves
#
# | `activations=` | stored in the forward pass | additional work in the backward pass |
# |---|---|---|
# | `keep` | all activations | none |
# | `checkpoint` | each block's input ([Chen 2016](https://arxiv.org/abs/1604.06174)) | recomputes the forward pass of every block |
# | `sqrt` | the input of every √depth-th block | recomputes segments of √depth blocks |
# | `selective` | results of matrix products and attention kernels | recomputes the cheap operations between them |
# | `reversible` | only the output of the last block ([Gomez 2017](https://arxiv.org/abs/1707.04585)) | rebuilds each block's input from its output |
# | `offload` | all activations, in the host's memory | copies them back; saves memory only on an accelerator |
#
# Therefore the stored activations grow with the depth with `keep`, grow with a smaller factor with `checkpoint`, and do not grow with `reversible`. (The segment that `sqrt` recomputes counts as workspace, not as stored activations.) The next cells use the same overrides as the command line (`python -m bench measure=plan model=small …`).

# %%
from dataclasses import replace

from hydra import compose, initialize_config_dir

from bench import CONFIGS
from bench.config.parse import parse
from bench.measure.predict import Prediction

STRATEGIES = ["keep", "checkpoint", "sqrt", "selective", "reversible"]


def cell(*overrides):
    """Return the spec of a cell from overrides, as on the command line."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=["measure=plan", "device=cpu", *overrides])).spec


base = cell("variant=dense", "model=small", "seq_len=4096", "depth=1")
steps = {
    (strategy, depth): Prediction(replace(base, activations=strategy, depth=depth)).predict()
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
        panels,
        ("peak_bytes", "saved_bytes"),
        ("peak of a step", "stored activations at the peak"),
        strict=True,
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
# ## The cost of recomputation
#
# A backward pass has about twice the FLOPs of a forward pass, so a step that recomputes every forward pass has 4/3 of the FLOPs of a normal step. This is also the case for `reversible`. The table also shows the remaining peak: at depth 8 the optimiser and the parameters, which no strategy changes, are a large part of it.

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
# ## The sizes that fit
#
# The longest sequence whose training step fits into 8 GiB; a few predictions are sufficient to find it. Change the variant, the model and the budget to yours. `make plan GPU_MEM=24GiB` does the same for every variant and writes a report.

# %%
BUDGET = 8 * 2**30

spec = cell("variant=dense", "model=small", "depth=4")
fits = {
    strategy: Prediction(replace(spec, activations=strategy)).longest_seq_len(BUDGET)
    for strategy in ("keep", "checkpoint", "reversible")
}
print(f"longest sequence in {units.size(BUDGET)}: dense, width 256, depth 4, batch 1, float32")
pd.DataFrame(
    {"tokens": pd.Series(fits).map(units.length), "/ keep": (pd.Series(fits) / fits["keep"]).map(units.ratio)}
)

# %% [markdown]
# The kernel also matters. `impl=naive` computes the same attention but stores the scores, a length × length matrix for each head:

# %%
kernels = {
    impl: Prediction(
        cell("variant=dense", f"variant.impl={impl}", "model=small", "depth=4", "seq_len=4096")
    ).predict()
    for impl in ("naive", "sdpa")
}
print("4,096 tokens:", ", ".join(f"{impl} {units.size(step.peak_bytes)}" for impl, step in kernels.items()))

# %% [markdown]
# Therefore, reduce memory in this order: first use a kernel that does not store the scores. Then use a strategy for activations, which makes the longest sequence several times longer, and more so for a deeper model. Only then consider another variant, which should be chosen for its *time*. Predictions do not include the memory of the device's libraries and fragmentation: plan a margin of a tenth.
