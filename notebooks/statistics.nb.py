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

USUAL = {
    "vocab_size": "that of the data",
    "tie_embeddings": "untied",
    "rotary_base": 10_000,
    "head_size": "width / heads",
    "kv_heads": "heads",
    "widen_feed_forward": "as wide as usual",
    "embedding_size": "width",
    "norm": "layer",
    "norm_position": "pre",
    "residual": "plain",
    "dropout": 0,
}
for key, usual in USUAL.items():  # older records do not contain them
    records[key] = records[key].astype(object).fillna(usual) if key in records else usual
records["tie_embeddings"] = records["tie_embeddings"].replace({True: "tied", False: "untied"})
records["widen_feed_forward"] = records["widen_feed_forward"].replace(
    {True: "wider", False: "as wide as usual"}
)

GROUP = ["objective", "data", "d_model", "heads", *SLOTS.values(), "ff_chunks", "batch_size"]
GROUP += [
    *USUAL,
    "dtype",
    "device",
    "device_name",
    "threads",
    "compile",
    "activations",
    "depth",
]
records["compile"] = records["compile"].fillna("off") if "compile" in records else "off"
CELL = [*GROUP, "variant", "label", "seq_len"]
TRAINING = ["train_budget", "train_amount", "schedule", "train_state", "learning_rate", "eval_split"]
TRAINING += ["eval_stride", *({"search_budget"} & {*records})]  # older reports do not have the latter
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
# Both are computed from logarithms. For two replicates the interval is their range, for more it is Student's t interval. A time that was measured under other load counts only if the cell has no other: of the twins of a replicate the first that is undisturbed counts, and replicates without one are left out.


# %%
def interval(values):
    logs = np.log(values.dropna().to_numpy(dtype=float))
    if len(logs) < 2:
        return np.nan, np.nan
    if len(logs) == 2:
        return np.exp(logs.min()), np.exp(logs.max())
    reach = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    return np.exp(logs.mean() - reach), np.exp(logs.mean() + reach)


def undisturbed(rows):
    order = rows["disturbed"] * 1000 + rows["twin"]
    rows = rows[order == order.groupby([rows[key] for key in [*CELL, "replicate"]]).transform("min")]
    some = (~rows["disturbed"]).groupby([rows[key] for key in CELL]).transform("any")
    return rows[~rows["disturbed"] | ~some]


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
timed = records[(records["status"] == "ok") & records["compared_seconds"].notna()]
timed = timed.assign(disturbed=timed["contaminated"].notna())
own = undisturbed(timed)
times = [name for name in FIGURES if name != "peak_bytes"]
rounds = own.groupby([*CELL, "replicate"])[times].median()
rounds = rounds.join(ok.groupby([*CELL, "replicate"])[["peak_bytes"]].median(), how="outer")
ranges = own.groupby(CELL)[times].agg(["min", "max"])
ranges = ranges.join(ok.groupby(CELL)[["peak_bytes"]].agg(["min", "max"]), how="outer")
cost = pd.concat(
    {
        name: rounds[source].groupby(level=CELL).agg(["median", low, high]).join(ranges[source])
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
MEASURED = ["rss_peak_bytes", "param_bytes", "optimizer_bytes", "peak_grad_bytes"]
MEASURED += ["peak_activation_bytes", "peak_workspace_bytes", "activation_bytes", "nvml_process_bytes"]
COMPUTED = ["params", "flops_algorithmic_step", "flops_executed_step", "flops_attention_step"]
YOUNGER = ["params_active", "launches_step", "bytes_moved_step"]
COMPUTED += [key for key in YOUNGER if key in records]  # older reports have none
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
by_time = own.groupby(CELL)
width = "step_precision" if "step_precision" in records else "sampling_half_width"
others["mfu"], others["half_width"] = by_time["mfu"].median(), by_time[width].median()
others["sampled_short"] = own["sampling_end"].eq("budget").groupby([own[key] for key in CELL]).sum()
others["disturbed"] = by_time["disturbed"].any()
others["disturbed"] = others["disturbed"].eq(True)
counts = ["replicates", "contaminated", "sampled_short"]
others[counts] = others[counts].fillna(0)
others

# %% [markdown]
# ## Ratios to dense
#
# Ratios of times and rates are computed within a replicate: to the geometric mean of the measurements of dense that started last before and first after, undisturbed if there are any. A ratio is disturbed if either side is. Those of other figures are computed from the medians. The reference is dense attention with `impl=sdpa`.

# %%
WHERE = [*GROUP, "seq_len", "replicate"]
RATIOS = ["compared_seconds", "compared_tokens_per_second", "step_seconds_median", "tokens_per_second"]
RATIOS += ["forward_seconds_median"]
sdpa = set(cells.loc[(cells["variant"] == "dense") & (cells["impl"] == "sdpa"), "label"])
dense = dict(list(timed[timed["label"].isin(sdpa)].groupby(WHERE)))


def nearest(row):
    found = dense[tuple(row[WHERE])]
    found = found if found["disturbed"].all() else found[~found["disturbed"]]
    start, starts = row["started_at"], found["started_at"]
    before, after = starts[starts <= start].max(), starts[starts > start].min()
    return found[starts.isin([before, after])]


compared = []
for _, row in timed.iterrows():
    if tuple(row[WHERE]) not in dense:
        continue
    if row["label"] in sdpa:
        compared.append(row[[*CELL, "replicate", "twin"]].to_dict() | dict.fromkeys(RATIOS, 1.0))
        compared[-1] |= {"disturbed": False, "baseline_measurements": np.nan}
        continue
    found = nearest(row)
    ratio = {name: row[name] / np.exp(np.log(found[name]).mean()) for name in RATIOS}
    compared.append(row[[*CELL, "replicate", "twin"]].to_dict() | ratio)
    compared[-1]["disturbed"] = row["disturbed"] or found["disturbed"].any()
    compared[-1]["baseline_measurements"] = len(found)
compared = undisturbed(pd.DataFrame(compared))
by_round = compared.groupby([*CELL, "replicate"])[RATIOS].median()
ratios = pd.DataFrame(index=others.index)
for source in RATIOS:
    name = f"{FIGURES[source]}_ratio"
    ends = by_round[source].groupby(level=CELL).agg(["median", low, high])
    ratios[[name, f"{name}_low", f"{name}_high"]] = ends
itself = ratios.index.get_level_values("label").isin(sdpa)
ratios.loc[itself, ratios.columns.str.contains("_low|_high")] = np.nan
ratios["rounds"] = by_round.groupby(level=CELL).size().reindex(ratios.index, fill_value=0)
flags = compared.groupby(CELL).agg({"disturbed": "any", "baseline_measurements": "min"})
ratios[["ratio_disturbed", "baseline_measurements"]] = flags
ratios["ratio_disturbed"] = ratios["ratio_disturbed"].eq(True)

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
# Undisturbed twins of one cell and replicate are paired in the order in which they started; the noise is the logarithm of the ratio of a pair. With 60 pairs or more the floor is their 95th percentile, and its bound an order statistic. With fewer pairs both follow from a model of all undisturbed measurements, log time = round + cell + error, with normal errors. The bound is that of a variance; it is wider if the errors have long tails.

# %%
SAME = [*CELL, *TRAINING, "measure"]
ROUND = [*(key for key in GROUP if key != "depth"), "measure", "replicate"]
sound = timed[~timed["disturbed"]].sort_values(["started_at", "twin"], kind="stable")
place = sound.groupby([*SAME, "replicate"], dropna=False).cumcount()
numbered = sound.assign(number=sound.groupby(SAME, dropna=False).ngroup(), pair=place // 2, later=place % 2)
twins = numbered.pivot_table("compared_seconds", ["device_name", "number", "replicate", "pair"], "later")
aa = np.log(twins[1] / twins[0]).dropna() if 1 in twins else pd.Series(dtype=float)


def bounds(logs, rows):  # the floor and its upper bound, as logarithms
    if len(logs) >= 60:
        sizes = np.sort(np.abs(logs.to_numpy()))
        rank = int(stats.binom.ppf(0.95, len(sizes), 0.95)) + 1
        return np.quantile(sizes, 0.95, method="weibull"), sizes[rank - 1]
    effects = [rows.groupby(keys, dropna=False).ngroup() for keys in (SAME, ROUND)]
    design = np.hstack([pd.get_dummies(effect).to_numpy(dtype=float) for effect in effects])
    target = np.log(rows["compared_seconds"].to_numpy(dtype=float))
    fitted, _, rank, _ = np.linalg.lstsq(design, target, rcond=None)
    rest = target - design @ fitted
    freedom = len(rows) - rank
    kurtosis = max(np.mean(rest**4) / np.mean(rest**2) ** 2, 6)
    floor = stats.norm.ppf(0.975) * np.sqrt(2 * np.sum(rest**2) / freedom)
    freedom = max(1, freedom * 2 / (kurtosis - 1))
    return floor, floor * np.sqrt(freedom / stats.chi2.ppf(0.05, freedom))


found = {name: bounds(logs, sound[sound["device_name"] == name]) for name, logs in aa.groupby("device_name")}
uppers = pd.Series({name: ends[1] for name, ends in found.items()}, dtype=float)
noise = pd.DataFrame({name: np.exp(ends) for name, ends in found.items()}, index=["floor", "upper"]).T
noise["pairs"] = aa.groupby("device_name").size()
noise["median"] = np.exp(aa.abs().groupby("device_name").median())
noise

# %% [markdown]
# ## Significant differences from dense
#
# A difference is significant if both ends of the ratio's interval are outside the noise floor's upper bound, on one side of 1, and if its p-value passes Holm's correction over all ratios. The floor is that of one pair, divided by √n for n ≥ 3 replicates. The p-value is that of the mean if the noise is normal, with the bound as its 95th percentile; without a floor, that of Student's t test. With one replicate, or with two if the floor is not known, there is no decision.

# %%
pair = uppers.reindex(ratios.index.get_level_values("device_name")).to_numpy(dtype=float)
n = ratios["rounds"].to_numpy()
floor = np.nan_to_num(pair / np.where(n > 2, np.sqrt(np.maximum(n, 1)), 1))
ends = np.log(ratios[["compared_seconds_ratio_low", "compared_seconds_ratio_high"]].to_numpy())
is_outside = (ends[:, 0] > floor) | (ends[:, 1] < -floor)
judged = ~np.isnan(ends).any(axis=1) & ((n > 2) | ~np.isnan(pair))
mean, reach = np.abs(ends.sum(axis=1)) / 2, np.diff(ends, axis=1)[:, 0] / 2
freedom = np.maximum(n - 1, 1)
with np.errstate(divide="ignore", invalid="ignore"):
    normal = 2 * stats.norm.sf(mean * np.sqrt(n) * stats.norm.ppf(0.975) / pair)
    student = 2 * stats.t.sf(mean * stats.t.ppf(0.975, freedom) / reach, freedom)
p = np.where(np.isnan(pair), student, normal)
order = [row for row in np.argsort(p) if judged[row]]
corrected = np.maximum.accumulate([p[row] * (len(order) - place) for place, row in enumerate(order)])
significant = np.zeros(len(p), dtype=bool)
significant[order] = corrected <= 0.05
ratios["differs"] = pd.Series(significant & is_outside, ratios.index).where(judged).astype("boolean")
ratios["noise_floor"] = np.exp(pair)
ratios["differs"].value_counts(dropna=False)


# %% [markdown]
# ## The smallest slowdown that is detected
#
# Each repetition samples its replicates from the A/A pairs, in either order of the twins. Its interval and its mean determine the shift from which it would be called different, as the only difference among all ratios; in 95 % of the repetitions this shift is smaller than the percentile.


# %%
def smallest_found(logs, replicates, upper):  # for three or more replicates
    either = np.sort(np.concatenate([logs, -logs]))
    draws = np.random.default_rng(0).choice(either, size=(4000, replicates))
    ends = np.array([np.log(interval(pd.Series(np.exp(draw)))) for draw in draws])
    floor = upper / np.sqrt(replicates)
    level = stats.norm.isf(0.025 / len(order)) / stats.norm.ppf(0.975)
    shift = np.maximum(floor - ends[:, 0], floor * level - ends.mean(axis=1))
    return np.exp(np.quantile(shift, 0.95))


noise["found_suggested"] = [
    smallest_found(aa.xs(name, level="device_name"), 5, uppers[name]) for name in noise.index
]
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
CONDITIONAL = ("dropped_tokens_share", "busiest_expert_share", "visits_per_token")
MIDDLE += [key for key in CONDITIONAL if key in trained]
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
older = {key: usual for key, usual in {**USUAL, "compile": "off"}.items() if key not in theirs}
theirs = pd.concat([theirs, pd.DataFrame(older, index=theirs.index)], axis=1)  # older reports have none
MATCH = [*KEYS, *(key for key in ("learning_rate", "train_budget", "eval_split") if key in theirs)]
for frame in (mine, theirs):
    frame[MATCH] = frame[MATCH].astype(object).fillna("")
mine, theirs = (frame.set_index(MATCH).sort_index() for frame in (mine, theirs))
assert mine.index.equals(theirs.index)
shared = [name for name in mine if name in theirs and pd.api.types.is_numeric_dtype(theirs[name])]
both = [frame[shared].astype(float) for frame in (mine, theirs)]
difference = ((both[0] - both[1]).abs() / both[1].abs().where(both[1] != 0, 1)).max()
difference.sort_values(ascending=False).head(10)
