# %% [markdown]
# # The statistics of the tables, computed from the records
#
# `report/cells.parquet` has one row for each record. Each cell below computes some figures of `report/summary.csv` and `report/noise.csv` from it, as the report describes; the last cell compares them with those files. The environment variable `RESULTS` sets another experiment's folder. Its report must have been built by this version of the code, and each of its tasks must have a single setting.

# %%
import os
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from bench.report.data.collect import labels, slot_names
from bench.report.data.groups import SLOT_COLUMNS

FOLDER = Path(os.environ.get("RESULTS", "../results/reference-cpu"))
records = pd.read_parquet(FOLDER / "report" / "cells.parquet")

# %% [markdown]
# ## Records that are used
#
# A cell that failed early may have no device name, number of threads or implementation; it gets those of the other cells. The parameters in its label distinguish different settings of a variant. If newer code measured a configuration again, in any replicate, only the records of that code are used. Cells with a memory budget are in other tables.

# %%
PEERS = {"device_name": ["device"], "threads": ["device"], "impl": ["variant", "variant_params"]}
for key, same in PEERS.items():
    records[key] = records[key].fillna(records.groupby(same)[key].transform("first"))
records["impl"] = records["impl"].fillna("unknown")
records["label"] = labels(records.rename(columns={"variant_params": "params_json"}))

SLOTS = {key: column for key, column in SLOT_COLUMNS.items() if key in records}  # older reports have none
for key, column in SLOTS.items():
    params = records[f"{key}_params"].fillna(records.groupby(key)[f"{key}_params"].transform("first"))
    records[column] = slot_names(records[key], params)

GROUP = ["objective", "data", "d_model", "heads", *SLOTS.values(), "ff_chunks", "batch_size"]
GROUP += ["dtype", "device", "device_name", "threads", "compile", "activations", "depth"]
records["compile"] = records["compile"].fillna("off") if "compile" in records else "off"
CELL = [*GROUP, "variant", "label", "seq_len"]
TRAINING = ["train_budget", "train_amount", "learning_rate", "eval_split", "eval_stride"]
one = records.sort_values(["started_at", "cell_id"]).groupby([*CELL, *TRAINING, "measure"], dropna=False)
newest = one["code_sha256"].transform("last")
records = records[(records["code_sha256"] == newest) & records["budget_bytes"].isna()]

# the time that is compared: the device's on a machine where all timed cells have one, else wall-clock time
for key in ("device_seconds_step", "launch_bound", "attention_kernels"):
    records[key] = records.get(key)  # older reports have none
wall, device = records["step_seconds_median"], records["device_seconds_step"].astype(float)
lacks = (records["status"] == "ok") & wall.notna() & device.isna()
machine = [records[key] for key in ("device", "device_name")]
by_device = device.notna().groupby(machine).transform("any") & ~lacks.groupby(machine).transform("any")
records["compared_seconds"] = wall.where(~by_device, device)
rate = records["tokens_per_second"]
records["compared_tokens_per_second"] = rate.where(~by_device, rate * wall / device)
cells = records[records["twin"] == 0]
ok = cells[cells["status"] == "ok"]


# %% [markdown]
# ## Median and interval over replicates
#
# Both are computed from logarithms. For two replicates the interval is their range, for more it is Student's t interval.

# %%
def interval(values):
    logs = np.log(values.dropna().to_numpy(dtype=float))
    if len(logs) < 2:
        return np.nan, np.nan
    if len(logs) == 2:
        return np.exp(logs.min()), np.exp(logs.max())
    reach = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    return np.exp(logs.mean() - reach), np.exp(logs.mean() + reach)


def low(values):
    return interval(values)[0]


def high(values):
    return interval(values)[1]


# %%
FIGURES = {
    "compared_seconds": "compared_seconds",
    "compared_tokens_per_second": "compared_tokens_per_second",
    "device_seconds_step": "device_seconds",
    "step_seconds_median": "step_seconds",
    "forward_seconds_median": "forward_seconds",
    "tokens_per_second": "tokens_per_second",
    "forward_tokens_per_second": "forward_tokens_per_second",
    "peak_bytes": "peak_bytes",
}
rounds = ok.groupby([*CELL, "replicate"])[list(FIGURES)].median()
cost = pd.concat(
    {
        name: rounds[source].groupby(level=CELL).agg(["median", low, high, "min", "max"])
        for source, name in FIGURES.items()
    },
    axis=1,
)
cost.columns = ["_".join(column) for column in cost.columns]
cost

# %% [markdown]
# ## Figures without an interval
#
# Other measured figures are from finished cells, figures that follow from the configuration are from all cells, and the errors of the gates are maxima.

# %%
MEASURED = ["mfu", "rss_peak_bytes", "param_bytes", "optimizer_bytes", "peak_grad_bytes"]
MEASURED += ["peak_activation_bytes", "peak_workspace_bytes", "activation_bytes", "nvml_process_bytes"]
COMPUTED = ["params", "flops_algorithmic_step", "flops_executed_step", "flops_attention_step"]
LAUNCHES = ["launches_step", "bytes_moved_step"]
COMPUTED += [key for key in LAUNCHES if key in records]  # older reports have none
COMPUTED += ["peak_bytes_predicted", "state_bytes", "cost_ratio"]
COMPUTED += ["claimed_time_exponent", "claimed_memory_exponent", "claimed_depth_exponent"]
COMPUTED += ["survey_exponent"]
GATES = ["leak_max_abs", "reference_max_abs", "recompute_max_abs"]
others = cells.groupby(CELL)[COMPUTED].median().join(ok.groupby(CELL)[[*MEASURED, "seconds_total"]].median())
others = others.join(cells.groupby(CELL)[GATES].max())
others["leaks"] = others["leak_max_abs"] > 1e-3
finished = cells.assign(done=cells["status"] == "ok").groupby(CELL)
others["records"], others["finished"] = finished.size(), finished["done"].sum()
others["replicates"] = ok.groupby(CELL)["replicate"].nunique()
chose_math = ok["attention_kernels"].fillna("").str.split(", ").map(lambda names: "math" in names)
chose_math &= ok["impl"] != "math"
flags = pd.DataFrame({"launch_bound": ok["launch_bound"].eq(True), "unasked_math": chose_math})
flags = flags.groupby([ok[key] for key in CELL]).any().reindex(others.index, fill_value=False)
others[flags.columns] = flags
others["contaminated"] = ok.groupby(CELL)["contaminated"].count()
counts = ["replicates", "contaminated"]
others[counts] = others[counts].fillna(0)
others

# %% [markdown]
# ## Ratios to dense
#
# Ratios of times and rates are computed within a replicate; those of other figures from the medians. The reference is dense attention with `impl=sdpa`.

# %%
WHERE = [*GROUP, "seq_len", "replicate"]
flat = rounds.reset_index()
sdpa = set(cells.loc[(cells["variant"] == "dense") & (cells["impl"] == "sdpa"), "label"])
dense = flat[flat["label"].isin(sdpa)]
pairs = flat.merge(dense[[*WHERE, *FIGURES]], on=WHERE, suffixes=("", "_dense"))
ratios = pd.DataFrame(index=others.index)
for source in ("compared_seconds", "compared_tokens_per_second", "step_seconds_median", "tokens_per_second"):
    ratio = pairs.set_index(CELL)[source] / pairs.set_index(CELL)[f"{source}_dense"]
    name = f"{FIGURES[source]}_ratio"
    ratios[[name, f"{name}_low", f"{name}_high"]] = ratio.groupby(level=CELL).agg(["median", low, high])
itself = ratios.index.get_level_values("label").isin(sdpa)
ratios.loc[itself, ratios.columns.str.contains("_low|_high")] = np.nan
ratios["rounds"] = pairs.groupby(CELL)["compared_seconds"].count().reindex(ratios.index, fill_value=0)

of = others[["flops_executed_step", "params"]].join(cost["peak_bytes_median"]).reset_index()
same = of[of["label"].isin(sdpa)].drop(columns=["variant", "label"])
both = of.merge(same, on=[*GROUP, "seq_len"], how="left", suffixes=("", "_dense")).set_index(CELL)
ratios["peak_bytes_ratio"] = both["peak_bytes_median"] / both["peak_bytes_median_dense"]
ratios["flops_executed_ratio"] = both["flops_executed_step"] / both["flops_executed_step_dense"]
ratios["params_ratio"] = both["params"] / both["params_dense"]
ratios

# %% [markdown]
# ## The noise floor
#
# The noise is the ratio of twin 1 to twin 0 of the same cell and replicate. With 19 pairs or more the floor is their 95th percentile, with fewer pairs it is Student's bound for one additional pair.

# %%
timed = records[(records["status"] == "ok") & records["compared_seconds"].notna()]
twins = timed.pivot_table(
    "compared_seconds", [*CELL, "measure", "replicate"], "twin", aggfunc="median"
).reindex(columns=[0, 1])
aa = np.log(twins[1] / twins[0]).dropna()


def floor_of(logs):
    sizes = np.abs(logs.to_numpy(dtype=float))
    if len(sizes) >= 19:
        return np.quantile(sizes, 0.95, method="weibull")
    return stats.t.ppf(0.975, len(sizes)) * np.sqrt(np.mean(sizes**2)) if len(sizes) else np.nan


floors = aa.groupby("device_name").apply(floor_of)
noise = pd.DataFrame({"floor": np.exp(floors), "pairs": aa.groupby("device_name").size()})
noise["median"] = np.exp(aa.abs().groupby("device_name").median())
noise

# %% [markdown]
# ## Significant differences from dense
#
# A difference is significant if the interval of the ratio excludes 1 and extends beyond the noise floor. The floor is that of one pair, divided by √n for n ≥ 3 replicates. With one replicate, or with two if the floor is not known, there is no decision.

# %%
pair = floors.reindex(ratios.index.get_level_values("device_name")).to_numpy(dtype=float)
floor = pair / np.where(ratios["rounds"] > 2, np.sqrt(np.maximum(ratios["rounds"], 1)), 1)
ends = np.log(ratios[["compared_seconds_ratio_low", "compared_seconds_ratio_high"]])
slower = (ends.iloc[:, 0] > 0) & (ends.iloc[:, 1] > np.nan_to_num(floor))
faster = (ends.iloc[:, 1] < 0) & (ends.iloc[:, 0] < -np.nan_to_num(floor))
judged = ends.notna().all(axis=1) & ((ratios["rounds"] > 2) | ~np.isnan(floor))
ratios["differs"] = (slower | faster).where(judged).astype("boolean")
ratios["noise_floor"] = np.exp(pair)
ratios["differs"].value_counts(dropna=False)


# %% [markdown]
# ## The smallest slowdown that is detected
#
# Each repetition samples its replicates from the A/A pairs, in either order of the twins. Its interval determines the shift from which it would be called different; in 95 % of the repetitions this shift is smaller than the percentile.

# %%
def smallest_found(logs, replicates):  # for three or more replicates
    either = np.sort(np.concatenate([logs, -logs]))
    draws = np.random.default_rng(0).choice(either, size=(4000, replicates))
    ends = np.array([np.log(interval(pd.Series(np.exp(draw)))) for draw in draws])
    floor = floor_of(pd.Series(logs)) / np.sqrt(replicates)
    return np.exp(np.quantile(np.maximum(-ends[:, 0], floor - ends[:, 1]), 0.95))


noise["found_suggested"] = [smallest_found(aa.xs(name, level="device_name"), 5) for name in noise.index]
noise

# %% [markdown]
# ## Quality
#
# Mean and standard deviation over replicates, for each training setting. A cell of text that needs more bits per byte than a 3-gram table that learnt the same bytes is undertrained. The report also compares all pairs of models, which `bench/report/data/paired.py` explains; `differences.csv` has them.

# %%
SCORES = ["nll", "bits_per_byte", "bits_per_byte_reset", "perplexity", "perplexity_reset"]
SCORES += ["word_perplexity", "accuracy"]
trained = ok.assign(
    perplexity_reset=np.exp(ok["nll_reset"]),
    bits_per_byte_reset=ok["nll_reset"] / ok["nll"] * ok["bits_per_byte"],
)
TABLES = [f"ngram_{order}_bits_per_byte" for order in range(1, 6)]
for place, table in enumerate(TABLES):
    lists = trained.get("ngram_bits_per_byte", [None] * len(trained))  # older reports have none
    trained[table] = [np.nan if bits is None else bits[place] for bits in lists]
OTHERS = ["ngram_train_bytes", *(f"{name}_bits_per_byte" for name in ("gzip", "xz", "zstd"))]
BASELINES = [*TABLES, *(name for name in OTHERS if name in trained)]
trained["train_amount"] = trained["train_amount"].fillna(trained["tokens_trained"].astype(float))
trained = trained[trained[SCORES].notna().any(axis=1)]
by = trained.groupby([*CELL, *TRAINING, "state_policy"], dropna=False)
quality = by[SCORES].agg(["mean", "std"])
quality.columns = ["_".join(column) for column in quality.columns]
MIDDLE = ["tokens_trained", "unigram_perplexity", "guess_accuracy", "tokens_evaluated", "train_seconds"]
quality = quality.join(by[[*MIDDLE, "eval_min_context"]].median()).join(by["leak_max_abs"].max())
CONTEXT = {
    "effective_context": "median",
    "effective_context_low": "min",
    "effective_context_high": "max",
    "best_history": "median",
    "context_harm": "median",
    "context_harm_low": "min",
}
CONTEXT = {key: how for key, how in CONTEXT.items() if key in trained}  # older reports have some
quality = quality.join(by[BASELINES].mean()).join(by.agg(CONTEXT))
quality = quality.join(by.size().rename("quality_replicates")).reset_index()
quality["undertrained"] = quality["bits_per_byte_mean"] > quality["ngram_3_bits_per_byte"]
quality.sort_values("nll_mean")

# %% [markdown]
# ## Comparison with the report
#
# The largest difference over all rows, relative to the report's figure.

# %%
KEYS = [key if key != "device_name" else "machine" for key in CELL]
mine = others.join(cost).join(ratios).reset_index().rename(columns={"device_name": "machine"})
trained = quality.rename(columns={"device_name": "machine"}).drop(columns="leak_max_abs")
mine = mine.merge(trained, on=KEYS, how="left")
theirs = pd.read_csv(FOLDER / "report" / "summary.csv")
theirs["compile"] = theirs.get("compile", "off")  # older reports have none
MATCH = [*KEYS, *(key for key in ("learning_rate", "train_budget", "eval_split") if key in theirs)]
for frame in (mine, theirs):
    frame[MATCH] = frame[MATCH].astype(object).fillna("")
mine, theirs = (frame.set_index(MATCH).sort_index() for frame in (mine, theirs))
assert mine.index.equals(theirs.index)
shared = [name for name in mine if name in theirs and pd.api.types.is_numeric_dtype(theirs[name])]
both = [frame[shared].astype(float) for frame in (mine, theirs)]
difference = ((both[0] - both[1]).abs() / both[1].abs().where(both[1] != 0, 1)).max()
difference.sort_values(ascending=False).head(10)
