# %% [markdown]
# # Training Reformer on dialogues
#
# A common course assignment: train a Reformer on dialogues, and say what its two ideas give and what they cost. The paper is [Kitaev et al. 2020](https://arxiv.org/abs/2001.04451), arXiv:2001.04451:
#
# 1. **Hashed attention** (§2) reads the keys that probably have the largest scores, instead of all keys.
# 2. **Reversible layers** (§3) store no activations; the backward pass rebuilds them.
#
# You write a file of dialogues, look at what hashing does, measure time and memory of a training step, train several models, and compare their loss on the answers. On two CPU cores this takes five to ten minutes. Finished cells are stored in `FOLDER` and not measured again.

# %%
import json
import random
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import longctx_bench
from bench.report.figures.canvas import look
from bench.report.figures.style import looks
from bench.report.text import units

# %%
FOLDER = Path("../outputs/reformer_dialogue")
N_DIALOGUES = 2000
SEQ_LEN = 256  # tokens that a model reads at once
TRAIN_TOKENS = 1_500_000
LENGTHS = [1024, 4096]  # tokens, for time and memory
DEPTH = 6  # blocks, for time and memory

# %% [markdown]
# ## The dialogues
#
# In each dialogue a user notes numbers and later asks for some of them. Most of an answer is only form (*It is gate …*). The number was said before: by the user one turn ago, or by both many turns ago. Therefore the loss on the answers shows whether a model finds distant tokens. `data=dialogue` reads such a file, one dialogue a line; [docs/tasks.md](../docs/tasks.md) describes the format, which also fits MultiWOZ and the messages of chat models. To use dialogues of your own, set `path` to your file.

# %%
THINGS = ["flight", "gate", "seat", "hotel", "room", "taxi", "locker", "platform"]


def dialogue(rng, n_exchanges=24):
    """Return a dialogue in which a user notes numbers and asks for them in any order."""
    numbers, new = {}, rng.sample(THINGS, len(THINGS))
    turns = [("user", "Please note a few numbers."), ("system", "Of course.")]
    for _ in range(n_exchanges):
        if new and (not numbers or rng.random() < 0.4):
            thing = new.pop()
            numbers[thing] = rng.randrange(10, 100)
            turns += [("user", f"I have {thing} {numbers[thing]}.")]
            turns += [("system", f"Noted, {thing} {numbers[thing]}.")]
        else:
            thing = rng.choice(list(numbers))
            turns += [("user", f"Which {thing}?"), ("system", f"It is {thing} {numbers[thing]}.")]
    return {"turns": [{"speaker": speaker, "text": text} for speaker, text in turns]}


FOLDER.mkdir(parents=True, exist_ok=True)
path = FOLDER / "dialogues.jsonl"
rng = random.Random(0)
path.write_text("".join(json.dumps(dialogue(rng)) + "\n" for _ in range(N_DIALOGUES)))
for turn in dialogue(random.Random(1))["turns"][:12]:
    print(f"{turn['speaker']:>6}: {turn['text']}")

# %% [markdown]
# ## What hashing does (§2)
#
# Dense attention computes the score of every query with every key, $T^2$ pairs for $T$ tokens. The softmax gives nearly all of its weight to the largest scores, so it is enough to find the keys that are *similar* to the query. Locality-sensitive hashing does this: similar vectors probably have the same hash. Reformer draws a random matrix $R$ with $b/2$ columns, and the bucket of a vector is
#
# $$h(x)=\arg\max\,[xR;\,-xR]$$
#
# one of $b$ buckets ([Andoni et al. 2015](https://arxiv.org/abs/1509.02897)). Queries and keys must get the same hash, so they are the same projection of the token, the *shared QK* of the paper. A token then reads the tokens of its bucket. Two similar vectors can be separated by chance. Therefore hashing is repeated with other matrices, in `n_hashes` rounds, and a token reads the union of all rounds:
#
# $$S_i=\bigcup_{r=1}^{n_\text{hashes}}\{j: h^{(r)}(x_j)=h^{(r)}(x_i)\}$$
#
# If one round finds a pair with probability $p$, then $n$ rounds find it with probability $1-(1-p)^n$. The next cell estimates this for pairs of vectors with a given cosine, with the formula above and $b=16$ buckets.

# %%
N_BUCKETS, DIM, DRAWS = 16, 32, 4000
generator = np.random.default_rng(0)


def bucket(x, rotations):
    """The bucket of each row of x, with a random matrix for each."""
    projected = np.einsum("nd,ndb->nb", x, rotations)
    return np.concatenate([projected, -projected], axis=1).argmax(axis=1)


cosines = np.linspace(-0.5, 1, 16)
found = []
for cosine in cosines:
    x, other = generator.normal(size=(2, DRAWS, DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    other -= (other * x).sum(axis=1, keepdims=True) * x
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    y = cosine * x + np.sqrt(1 - cosine**2) * other
    rotations = generator.normal(size=(DRAWS, DIM, N_BUCKETS // 2))
    found.append((bucket(x, rotations) == bucket(y, rotations)).mean())
same_bucket = np.array(found)

with look():
    figure, panel = plt.subplots(figsize=(6.4, 3.6))
    for rounds, colour in zip((1, 2, 4, 8), ("#E69F00", "#009E73", "#0072B2", "#882255"), strict=True):
        panel.plot(cosines, 1 - (1 - same_bucket) ** rounds, color=colour, label=f"n_hashes={rounds}")
    panel.set(
        xlabel="cosine of query and key",
        ylabel="probability that the pair is read",
        title=f"{N_BUCKETS} buckets, vectors of {DIM} numbers",
    )
    panel.legend(loc="upper left")
    figure.tight_layout()
    plt.show()

# %% [markdown]
# With one round, even a key with a cosine of 0.8 is missed more often than it is found. With eight rounds it is hardly ever missed, but many more unrelated pairs are read too, and each round costs as much as the first.
#
# The number of buckets grows with the length, so that a bucket keeps about as many tokens ($b=2T/c$ for a window of $c$ tokens, `variant.chunk`). Sorting the tokens by bucket takes $T\log T$ operations, and each token then reads at most $c$ earlier tokens in each round: the cost is $O(T\log T)$ instead of $O(T^2)$ (Table 1). `variants/attention/reformer.py` states where this project differs from the paper: a token reads the *last* $c$ tokens of its bucket, because chunks of the sorted order let later tokens choose the keys of earlier ones.
#
# ## What reversible layers do (§3)
#
# A normal block adds to its input, $y=x+F(x)$, and the backward pass needs the activations of every block. A reversible block has two streams ([Gomez et al. 2017](https://arxiv.org/abs/1707.04585)), with attention as $F$ and the feed-forward layer as $G$:
#
# $$y_1=x_1+F(x_2),\qquad y_2=x_2+G(y_1)$$
#
# Its inputs follow from its outputs, $x_2=y_2-G(y_1)$ and $x_1=y_1-F(x_2)$. Therefore nothing is stored, and the memory of activations does not grow with the depth. The price is that $F$ and $G$ run again in the backward pass. `activations=keep` stores everything, `activations=reversible` stores nothing; both work with every variant.
#
# ## Time and memory of a training step
#
# `sweep` measures each combination in a process of its own, and returns a data frame with one row a cell. `measure=quick` does not train.

# %%
common = {"results_dir": str(FOLDER), "data": "dialogue", "data.path": str(path), "data.bpe": 400}
cost = longctx_bench.sweep(
    [
        {"variant": variant, "seq_len": seq_len, "activations": activations}
        for seq_len in LENGTHS
        for variant in ("dense", "reformer")
        for activations in ("keep", "reversible")
    ],
    **{"name": "cost", "measure": "quick", "measure.eval_tokens": 0, "depth": DEPTH},
    **common,
)
assert (cost["status"] == "ok").all(), cost["reason"].dropna().tolist()
print(f"{cost['device_name'].iloc[0]}, depth {DEPTH}, threads: {cost['threads'].iloc[0]}")
sizes = cost.set_index(["seq_len", "variant", "activations"]).sort_index()
pd.DataFrame(
    {
        "time of a step": sizes["step_seconds_median"].map(units.seconds),
        "peak memory": sizes["peak_bytes"].map(units.size),
        "of which activations": sizes["peak_activation_bytes"].map(units.size),
        "FLOPs of attention": sizes["flops_attention_step"].map(units.flops),
    }
)

# %%
with look():
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.4))
    for panel, column, scale, label in zip(
        panels,
        ("step_seconds_median", "peak_bytes"),
        (1e-3, 2**20),
        ("time of a step, ms", "peak memory, MiB"),
        strict=True,
    ):
        for (variant, activations), line in cost.groupby(["variant", "activations"]):
            colour, marker = looks(variant, ["dense", "reformer"])
            style = "-" if activations == "keep" else "--"
            line = line.sort_values("seq_len")
            panel.plot(
                line["seq_len"].map(units.length),
                line[column] / scale,
                color=colour,
                marker=marker,
                linestyle=style,
                label=f"{variant}, {activations}",
            )
        panel.set(xlabel="sequence length", ylabel=label)
        panel.set_ylim(bottom=0)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    plt.show()

# %% [markdown]
# Read the two ideas apart. *Hashing* changes the time: its advantage grows with the length, and for short sequences hashing and sorting cost more than they save. It hardly changes the memory, because the kernel of dense attention does not store $T\times T$ scores either, which was different when the paper was written. *Reversible layers* change the memory, for both variants, and take more time because they compute each block again.
#
# ## Training
#
# The models below read the same dialogues in the same order. What differs is only what the name says:
#
# | model | attention | activations |
# |---|---|---|
# | dense | all earlier tokens | keep |
# | dense, reversible | all earlier tokens | reversible |
# | shared QK | all earlier tokens, with one projection for queries and keys: Reformer with one bucket | keep |
# | 1, 4 rounds | hashed, `n_hashes` of 1 and 4 | keep |
# | 4 rounds, reversible | hashed | reversible |
#
# The model *shared QK* is between the other two: from dense to shared QK only the projection changes, from shared QK to hashed only the hashing.

# %%
full = {"variant.n_buckets": 1, "variant.chunk": SEQ_LEN}
models = {
    "dense": {"variant": "dense"},
    "dense, reversible": {"variant": "dense", "activations": "reversible"},
    "shared QK": {"variant": "reformer", **full},
    "1 round": {"variant": "reformer", "variant.n_hashes": 1},
    "4 rounds": {"variant": "reformer", "variant.n_hashes": 4},
    "4 rounds, reversible": {"variant": "reformer", "variant.n_hashes": 4, "activations": "reversible"},
}
training = {
    "name": "trained",
    "seq_len": SEQ_LEN,
    "depth": 2,
    "batch_size": 4,
    "measure.train_tokens": TRAIN_TOKENS,
    "measure.learning_rate": 0.005,
    "measure.time_seconds": 0.2,
    "measure.history_targets": 0,
    "measure.attention_windows": 2,
}
cells = {name: longctx_bench.run(**knobs, **training, **common) for name, knobs in models.items()}
assert all(cell.status == "ok" for cell in cells.values()), [cell.reason for cell in cells.values()]
trained = pd.DataFrame({name: vars(cell) for name, cell in cells.items()}).T
pd.DataFrame(
    {
        "loss of the answers": trained["nll"].map("{:.3f}".format),
        "bits per byte": trained["bits_per_byte"].map("{:.3f}".format),
        "time of a step": trained["step_seconds_median"].map(units.seconds),
        "peak memory": trained["peak_bytes"].map(units.size),
        "parameters": trained["params"].map(units.count),
    }
)

# %% [markdown]
# The loss is in nats per token and counts only the answers, which are the turns of `system`. Questions are read, not scored. Read the rows in pairs:
#
# - *dense* and *shared QK*: the cost of one projection for queries and keys. At the paper's sizes, after long training, there is none (§5, figure 3). After a training as short as this one, there can be. One possible reason, which this notebook does not test, is that keys have unit length (§2): a model needs long queries for sharp attention, and must learn them first.
# - *shared QK*, *4 rounds* and *1 round*: the cost of hashing. Training draws new rotations in every step. With one round, most of the pairs that a model would learn from are missed in most steps, and it may not even learn to copy from the turn before; four rounds can be as good as full attention.
# - *keep* and *reversible*: the network with two streams is another network of the same size. Its loss differs a little, in either direction; its memory is smaller, and its step slower.
#
# How does the loss change in the course of a dialogue? `nll_by_answer` has the mean over the first, second, … answers.

# %%
COLOURS = ["#000000", "#888888", "#009E73", "#E69F00", "#0072B2", "#56B4E9"]
with look():
    figure, panel = plt.subplots(figsize=(7.8, 3.8))
    for (name, losses), colour in zip(trained["nll_by_answer"].items(), COLOURS, strict=True):
        style = "--" if "reversible" in name else "-"
        panel.plot(range(1, len(losses) + 1), losses, color=colour, linestyle=style, marker="o", label=name)
    panel.set(xlabel="answer of a dialogue (16: all later ones)", ylabel="nats per token (lower is better)")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    plt.show()

# %% [markdown]
# The first answer is always the same sentence, so its loss is nearly 0. In the second, the number stands in the turn before. Later answers are harder, because more numbers have been said, and farther back: the curve rises. A model that does not find a number guesses one of 90, which costs $\ln 90\approx 4.5$ nats, spread over the tokens of the answer. A curve that is high from the second answer on belongs to a model that has not learnt to copy from the turn before; a curve that starts low and rises belongs to one that has, but loses what is farther back.
#
# ## How much does hashing miss?
#
# `softmax_error` compares the outputs of a hashed layer, after training, with those of full attention with the same weights: the relative error, 0 if hashing misses nothing.

# %%
hashed = trained[trained["softmax_error"].notna()]
pd.DataFrame(
    {
        "error of a layer's output": hashed["softmax_error"].map(units.percent),
        "FLOPs of attention": hashed["flops_attention_step"].map(units.flops),
        "loss of the answers": hashed["nll"].map("{:.3f}".format),
    }
)

# %% [markdown]
# With one bucket the error is 0 up to rounding, as it must be. A larger `n_hashes` brings a layer nearer to full attention, and the attention costs proportionally more (§5, figure 4). At these few tokens, four rounds have more FLOPs than full attention: hashing is for long sequences, as the first table shows. One short run with one seed does not rank models whose losses are near each other: repeat it with `replicate=1, 2, …` before you conclude anything from a small difference. The sizes and rates here were chosen so that a few minutes of training show something; they were not tuned for each model.
#
# ## The report
#
# `report` writes tables, plots and an interactive page of an experiment; `load` returns its records in a later session.

# %%
records = longctx_bench.load(FOLDER / "trained")
print(f"{len(records)} records; the report is {longctx_bench.report(FOLDER / 'trained').name}/index.html")

# %% [markdown]
# ## Exercises
#
# 1. Set `LENGTHS` to `[512, 1024, 2048, 4096, 8192]`. From which length on is Reformer faster than dense attention on your machine?
# 2. Set `DEPTH` to 12. Which of the columns of the first table change with `activations=reversible`, and which do not?
# 3. Train with `variant.n_hashes` of 2 and 8, and with three replicates each. Is the order of the losses that of the errors?
# 4. Train with `variant.chunk=16`: a token reads fewer tokens of its bucket. What happens to early and to late answers?
# 5. Train `variant=longformer variant.window=64`. Which answers can a window not give, whatever the training?
