# %% [markdown]
# # Comparing variants
#
# A sweep writes one record for each *cell*: one variant at one length, depth and so on, run once, in a separate process. Two lines load the records into a data frame; the rest of this notebook analyses it. It reads the reference run of the repository (`make bench` on two CPU cores). To read yours instead, set `RESULTS` to its folder before you start Jupyter, such as `RESULTS=$PWD/results/gpu`.

# %%
import os
from functools import partial

from bench.records import load

records = load(os.environ.get("RESULTS", "../results/reference-cpu"))

# %% [markdown]
# `results/README.md` explains every key. Units are part of the names: `_bytes`, `_seconds`. A figure that was not measured is missing, never 0. First, which cells are there, and did all of them finish?

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from bench.report.figures.canvas import human_axis, lengths_axis, look
from bench.report.figures.style import looks, variant_rank
from bench.report.text import units

records = records[records["twin"] == 0]
axes = ["variant", "seq_len", "depth", "d_model", "objective", "activations", "replicate"]
print(f"{len(records)} records from {', '.join(records['device_name'].dropna().unique())}")
pd.DataFrame(
    {axis: [records[axis].nunique(), records[axis].unique().tolist()] for axis in axes}, ["number", "values"]
).T

# %%
records.groupby("status")["reason"].agg(["size", "first"])

# %% [markdown]
# ## How much does a step cost, compared with dense attention?
#
# A *step* is one forward and one backward pass. The times of different processes differ by more than the samples of one process. Therefore take the ratio to dense **within a replicate**, because both ran in the same round, and then the median over replicates.

# %%
SETTING = ["objective", "d_model", "feed_forward", "stack", "activations", "batch_size", "device_name"]
finished = records[records["status"] == "ok"]
timed = finished[finished["step_seconds_median"].notna()]
rounds = [*SETTING, "depth", "seq_len", "replicate"]
dense = timed[timed["variant"] == "dense"].groupby(rounds)["step_seconds_median"].median()
ratio = timed["step_seconds_median"] / dense.reindex(pd.MultiIndex.from_frame(timed[rounds])).to_numpy()
costs = timed.assign(ratio=ratio)

several = costs.groupby(SETTING)["seq_len"].transform("nunique") > 1
lengths = costs[several] if several.any() else costs
table = lengths.pivot_table("ratio", ["objective", "depth", "variant"], "seq_len", aggfunc="median")
table.style.format("{:.2f}×", na_rep="–").background_gradient(
    cmap="PuOr_r", gmap=np.log2(table), axis=None, vmin=-2, vmax=2
)

# %% [markdown]
# Below 1× a variant is cheaper than dense, above it more expensive; a notebook colours these cells purple and orange. Find the length at which a row crosses 1×: a variant whose cost is linear in the length is not necessarily cheap at 512 tokens. If no dense model of the experiment has the same objective, a variant has no ratio and no row: in the reference run this is the case for Linformer, which is bidirectional only.
#
# ## Time and memory against length
#
# Both axes are logarithmic, so a power of the length is a straight line whose slope is the exponent; the slope of dense attention increases towards 2. A marker is a median over replicates, and a line connects the markers of one variant. Colours and markers are the same as in all plots of this project.


# %%
def source(cells):
    """Return the machine, the days and the number of replicates, which every plot should state."""
    days = sorted(set(cells["started_at"].str[:10]))
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{cells['device_name'].iloc[0]} · {dates} · {cells['replicate'].nunique()} replicates"


def against_length(cells, column, title, show, *, binary=False):
    """One panel per depth, one line per variant, and a band from minimum to maximum of its replicates."""
    depths = sorted(cells["depth"].unique())
    figure, panels = plt.subplots(
        1, len(depths), figsize=(4.2 * len(depths) + 1.6, 3.6), sharey=True, squeeze=False
    )
    for panel, depth in zip(panels[0], depths, strict=True):
        here = cells[cells["depth"] == depth]
        for name in sorted(here["variant"].unique(), key=variant_rank):
            colour, marker = looks(name, cells["variant"])
            line = here[here["variant"] == name].groupby("seq_len")[column].agg(["median", "min", "max"])
            panel.plot(line.index, line["median"], color=colour, marker=marker, label=name)
            panel.fill_between(line.index, line["min"], line["max"], color=colour, alpha=0.15, linewidth=0)
        panel.set(xscale="log", yscale="log", title=f"depth {depth}", xlabel="sequence length")
        lengths_axis(panel.xaxis, here["seq_len"])
        human_axis(panel.yaxis, *panel.get_ylim(), show, binary=binary)
    panels[0][0].set_ylabel(title)
    figure.suptitle(
        f"{title}, {cells['objective'].iloc[0]}, width {cells['d_model'].iloc[0]} · {source(cells)}",
        fontsize=9,
    )
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    plt.show()


# the setting with the most cells
setting = lengths.groupby(SETTING).size().idxmax()
one = lengths.set_index(SETTING).loc[[setting]].reset_index()
with look():
    against_length(one, "step_seconds_median", "time of a step", units.seconds)
    against_length(one, "peak_bytes", "peak memory", units.size, binary=True)

# %% [markdown]
# The memory is that of a whole training step: parameters, gradients, optimiser and activations. The kernel of dense attention stores no length × length matrix, so dense attention is also a straight line in this plot, and a variant that saves *time* does not necessarily save memory. [memory.ipynb](memory.ipynb) shows the parts of the peak and how to reduce it.
#
# ## How fast does a cost grow?
#
# The slope between the two longest lengths, next to the claim of the paper, which is for attention alone. A step also contains projections and feed-forward layers, which are linear in the length, so at such lengths a slope is between 1 and the claim.

# %%
medians = one.groupby(["variant", "depth", "seq_len"])[
    ["step_seconds_median", "peak_bytes", "claimed_time_exponent"]
].median()
two = medians.groupby(["variant", "depth"]).tail(2).reset_index()
ends = two.groupby(["variant", "depth"]).agg(["first", "last"])
growth = pd.DataFrame(
    {
        what: np.log(ends[what, "last"] / ends[what, "first"])
        / np.log(ends["seq_len", "last"] / ends["seq_len", "first"])
        for what in ("step_seconds_median", "peak_bytes")
    }
).rename(columns={"step_seconds_median": "time grows as T^", "peak_bytes": "memory grows as T^"})
growth["claimed of attention"] = ends["claimed_time_exponent", "last"]
growth.sort_values("time grows as T^").style.format("{:.2f}", na_rep="–")

# %% [markdown]
# ## Quality against cost
#
# All models were trained on the same number of tokens. Lower is better on both axes, so the best models are at the lower left: a variant is on the *front* (with a ring) if no other variant is both faster and better. A variant that needs more bits per byte than a 3-gram table that learnt the same text (the dotted line) is undertrained: it is shown, but is on no front and keeps none off it. Bidirectional models predict masked tokens, which is another task, so they are not in the same plot. Variants that are known to read later tokens are excluded.

# %%
trained = finished[finished["nll"].notna() & ~(finished["leak_max_abs"] > 1e-3)]
SAME = ["objective", "data", "d_model", "feed_forward", "stack", "depth", "seq_len"]
SAME += ["train_budget", "train_amount"]
if len(trained):
    pool = trained.groupby(SAME, dropna=False)["variant"].nunique().idxmax()
    models = trained.set_index(SAME).loc[[pool]].reset_index()
    unit = "bits per byte" if models["bits_per_byte"].notna().any() else "nats per token"
    third = [float("nan") if bits is None else bits[2] for bits in models["ngram_bits_per_byte"]]
    models = models.assign(table=third, loss=models["bits_per_byte"].fillna(models["nll"]))
    points = models.groupby("variant")[["loss", "step_seconds_median"]].agg(["mean", "std", "size"])
    ranked = ~(points["loss", "mean"] > models.groupby("variant")["table"].mean())
    with look():
        figure, panel = plt.subplots(figsize=(7.2, 4.4))
        for name in sorted(points.index, key=variant_rank):
            colour, marker = looks(name, points.index)
            time, loss = points.loc[name, ("step_seconds_median", "mean")], points.loc[name, "loss"]
            panel.errorbar(
                time, loss["mean"], loss["std"], color=colour, marker=marker, linestyle="", label=name
            )
            better = (points["loss", "mean"] < loss["mean"]) & (points["step_seconds_median", "mean"] < time)
            if ranked[name] and not (better & ranked).any():
                panel.plot(time, loss["mean"], "o", markersize=14, fillstyle="none", color="#555555")
        if models["table"].notna().any():
            panel.axhline(models["table"].mean(), color="#555555", linestyle=":", label="3-gram table")
        panel.set(xscale="log", xlabel="time of a step", ylabel=f"held-out loss, {unit} (lower is better)")
        human_axis(panel.xaxis, *panel.get_xlim(), partial(units.seconds, short=True), binary=False)
        panel.set_title(
            f"{pool[0]}, {pool[1]}, width {pool[2]}, depth {pool[5]}, {pool[6]} tokens a sequence; "
            f"mean ± deviation\n{source(models)}",
            fontsize=8,
        )
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        plt.show()
else:
    print("nothing was trained in this experiment")

# %% [markdown]
# How to read it: if bars overlap, this number of replicates does not show a difference. A small model after a short training shows how fast variants *learn at the start*, not their final quality. `report/summary.md` has intervals and ranks; [statistics.ipynb](statistics.ipynb) computes the intervals from the records step by step.
#
# ## Does a long context help?
#
# The loss by position in the window: if a model uses its context, later tokens have a lower loss. Element *k* covers the positions from 2ᵏ − 1 to 2ᵏ⁺¹ − 2 of a window, counted from 0. The last marker may cover only one position, the end of the window, and is then not reliable.

# %%
if len(trained):
    by_position = models.dropna(subset=["nll_by_position"])
    with look():
        figure, panel = plt.subplots(figsize=(7.2, 4.0))
        for name in sorted(by_position["variant"].unique(), key=variant_rank):
            colour, marker = looks(name, by_position["variant"])
            rows = by_position.loc[by_position["variant"] == name, "nll_by_position"]
            curve = np.mean([np.array(list(row), dtype=float) for row in rows], axis=0)
            panel.plot(2 ** np.arange(len(curve)), curve, color=colour, marker=marker, label=name)
        panel.set(xscale="log", xlabel="tokens before the target", ylabel="nats per token")
        lengths_axis(panel.xaxis, 2 ** np.arange(len(curve)))
        panel.set_title(f"loss by position, mean · {source(by_position)}", fontsize=8)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        plt.show()

# %% [markdown]
# ## Your own question
#
# The records are a data frame, so group it by any key. For example: how many bytes of state does each variant carry from one token to the next, and how many FLOPs does attention alone take?

# %%
longest = one[one["seq_len"] == one["seq_len"].max()]
own = longest.groupby("variant")[
    ["state_bytes", "flops_attention_step", "flops_executed_step", "params"]
].median()
pd.DataFrame(
    {
        "carried": own["state_bytes"].map(units.size),
        "attention FLOPs": own["flops_attention_step"].map(units.flops),
        "executed FLOPs of a step": own["flops_executed_step"].map(units.flops),
        "parameters": own["params"].map(units.count),
    }
).loc[sorted(own.index, key=variant_rank)]
