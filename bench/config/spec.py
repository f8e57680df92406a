"""The configuration of a cell: everything on which a record's figures depend, and where the record is stored.

Each knob is declared here once (`variants.knobs`): the configuration's defaults, checks, help and the hash of
a cell follow from the declaration. Knobs of a variant, a task, a feed-forward layer or a depth schedule are
declared in its module.

Over 300 lines: all other knobs are declared here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import variants
from bench import tasks
from bench.config import chosen
from bench.inputs.sizes import parse_bytes
from bench.trackers import TrackerSpec
from variants.head_size import ROTARY_BASE, unusable_heads
from variants.knobs import Knobs, decisive, knob, knobs_of
from variants.slots import FEED_FORWARD, SLOTS, STACK, Slot

if TYPE_CHECKING:
    from bench.model.slots import ModelSpec
    from bench.tasks.base import Setting, Task, TaskConfig
    from variants.base import Dims, Variant, VariantConfig, Workload

Strategy = Literal["keep", "checkpoint", "sqrt", "selective", "reversible", "offload"]
ACTIVATIONS: tuple[str, ...] = get_args(Strategy)
"""The names of the activation strategies."""
TrainBudget = Literal["tokens", "flops", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Spec(Knobs):
    """Knobs of the harness itself. A knob of type float always contains a float, so that 1 and 1.0 give the
    same cell."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the checked knobs, as `Knobs.of` does."""
        known = knobs_of(cls)
        floats = [
            name
            for name in values
            if name in known and float in (known[name].hint, *get_args(known[name].hint))
        ]
        read = {name: known[name].read(values[name]) for name in floats}
        exact = {name: float(value) for name, value in read.items() if type(value) is int}
        return super().of({**values, **exact})


@dataclass(frozen=True, kw_only=True)
class Root(Spec):
    """The knobs outside of any group."""

    seq_len: int = knob(1024, least=1, unit="tokens")
    """Length of a sequence."""
    depth: int = knob(2, least=1, most=2**16, unit="blocks")
    """Blocks of the model, or visits of them if `stack` visits a block several times."""
    batch_size: int | Literal["fit"] = knob(1, least=1, unit="sequences")
    """Sequences in a step; fit is the largest number that fits into measure.budget."""
    step_tokens: int | None = knob(None, least=1, unit="tokens", decides=False)
    """Tokens of a step, in place of batch_size: step_tokens / seq_len sequences. It keeps the work of a step
    constant in a sweep over lengths."""
    replicate: int = knob(0, least=0)
    """The seed. Sweep it to measure the spread."""
    twin: int = knob(0, least=0, younger=True)
    """1, 2, … measure the same cell again. The difference between the measurements is noise."""
    objective: str = "auto"
    """clm, mlm, an objective of the task, or auto: clm if the variant and the stack have a causal form."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the cell; auto is cuda if it is available."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of parameters and activations."""
    compile: Literal["off", "block", "model"] = knob("off", younger=True)
    """Compile each block by torch.compile, or the whole model, before the step is timed and trained. The
    compiler's own cost is measured separately."""
    results_dir: str = knob("results", decides=False)
    """Folder that contains all experiments."""
    name: str = knob("adhoc", decides=False)
    """The experiment's folder under results_dir."""
    force: bool = knob(False, decides=False)
    """Measure finished cells again."""
    rerun: Literal["none", "contaminated", "oom"] = knob("none", decides=False)
    """Finished cells to measure again. contaminated: cells that were disturbed by other load. oom: cells that
    ran out of memory."""
    remeasure: bool = knob(True, decides=False)
    """Measure cells again that were disturbed by other load, at the end of their round. Each is repeated at
    most once, and all together take at most a minute and a quarter of the time of the first measurements."""
    audit_oom: float = knob(0.05, least=0, most=1, decides=False)
    """Share of the cells predicted to exceed their memory that run nevertheless, to check predictions."""
    skip_after_oom: bool = knob(True, decides=False)
    """Skip a cell if a shorter but otherwise equal one ran out of memory."""
    devices: int | Literal["all"] = knob("all", least=1, unit="devices", decides=False)
    """Number of accelerators of this machine that a sweep uses at the same time, one cell on each."""
    report_minutes: float | None = knob(None, least=0, unit="minutes", decides=False)
    """Write the report after each round of replicates, and within a round whenever this time has passed. null
    writes none during the sweep; neither do jobs of a cluster."""
    estimate: Literal["h100", "a100", "rtx4090", "b200"] | None = knob(None, decides=False)
    """Print the estimated duration of the sweep on one card of this kind, and run nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes(Spec):
    """The sizes of the transformer."""

    size: str = "tiny"
    """Name of the group's entry, for people."""
    d_model: int = knob(64, least=2, unit="channels")
    """Width of the model."""
    heads: int = knob(2, least=1, unit="heads")
    """Attention heads of a layer; they divide d_model, unless model.head_size is given."""
    ff_chunks: int = knob(1, least=1, unit="pieces")
    """Pieces of the sequence to which the feed-forward layer is applied one at a time."""
    dropout: float = knob(0.0, least=0, below=1)
    """Probability that an activation is dropped in training."""
    vocab_size: int | None = knob(None, least=2, unit="tokens", younger=True)
    """Rows of the embedding and of the output layer; null is the vocabulary of the data. Rows beyond it are
    never used, but cost as much as those of a model with a larger vocabulary."""
    tie_embeddings: bool = knob(False, younger=True)
    """Use the weights of the embedding as those of the output layer."""
    rotary_base: float = knob(ROTARY_BASE, above=1, younger=True)
    """Base of the angles of rotary positions. Layers with another position scheme do not use it."""
    head_size: int | None = knob(None, least=2, unit="channels", younger=True)
    """Channels of an attention head, an even number; null is d_model / heads."""
    kv_heads: int | None = knob(None, least=1, unit="heads", younger=True)
    """Heads of keys and values, which divide the heads; null is the number of heads. With 1, all query heads
    read the same keys and values (multi-query attention); with more, groups of them do (grouped-query)."""
    widen_feed_forward: bool = knob(False, younger=True)
    """Widen the feed-forward layers by the parameters that shared keys and values save."""
    embedding_size: int | None = knob(None, least=1, unit="channels", younger=True)
    """Channels of a factorised embedding, whose vectors a matrix maps to d_model, as in ALBERT; null is an
    embedding of d_model channels. The output layer has the same two factors."""
    norm: Literal["layer", "rms", "none"] = knob("layer", younger=True)
    """The norm of a block and before the output layer: layer norm, RMSNorm, or none."""
    norm_position: Literal["pre", "post"] = knob("pre", younger=True)
    """Normalise the input of each branch (pre), or the sum of the branch and its input (post)."""
    residual: Literal["plain", "rezero"] = knob("plain", younger=True)
    """Add a branch to its input as it is, or times a learnt number that starts at 0; ReZero is the latter
    with norm=none."""

    def __post_init__(self) -> None:
        if reason := unusable_heads(self.d_model, self.heads, self.head_size, self.kv_heads):
            raise ValueError(reason)
        if self.widen_feed_forward and self.kv_heads is None:
            raise ValueError("widen_feed_forward=true: needs kv_heads, which says how many parameters to add")
        if self.embedding_size is not None:
            allowed = f"null or at most d_model={self.d_model}, which it is mapped to"
            self.require("embedding_size", self.embedding_size <= self.d_model, allowed)
        if self.norm == "none":
            self.require("norm_position", self.norm_position == "pre", "pre, because norm=none has no norm")


@dataclass(frozen=True, kw_only=True)
class ActivationsSpec(Spec):
    """How activations are stored for the backward pass."""

    name: Strategy = "keep"
    """How activations are stored for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MeasureSpec(Spec):
    """The figures to measure, and their budgets."""

    preset: str = "standard"
    """Name of the group's entry, for people."""
    execute: bool = True
    """Run the cell; false only predicts FLOPs and peak memory, with fake tensors."""
    time_seconds: float = knob(1.0, least=0, unit="seconds")
    """Wall-clock time for the samples of a step, and the same for those of a forward pass."""
    min_samples: int = knob(3, least=1, unit="samples")
    """Minimum number of samples of each, regardless of the time. Fewer than six have no interval, so that no
    precision is known."""
    precision: float = knob(0.03, least=0, younger=True)
    """Half-width of the median's 95 % interval at which sampling ends early. It is relative to the median; 0
    always uses the whole time."""
    profile: bool = knob(False, younger=True)
    """Trace one training step with torch's profiler, after it was timed. The experiment's folder profiles/
    has the trace, and a table of the ten operations that take the most time."""
    train_budget: TrainBudget = "tokens"
    """Which of the next three knobs limits training; the other two are ignored. For tokens and FLOPs the
    number of steps is rounded up, and the cell is reproducible to the bit on a CPU. For seconds the number of
    steps depends on the machine, so the cell is not reproducible."""
    train_tokens: int = knob(0, least=0, unit="tokens")
    """Tokens of training before quality is evaluated; 0 measures no quality."""
    train_flops: float = knob(0.0, least=0, unit="FLOPs")
    """The same in algorithmic FLOPs of the variant's steps."""
    train_seconds: float = knob(0.0, least=0, unit="seconds")
    """The same in seconds of wall-clock time, without checkpoints."""
    eval_split: Literal["test", "validation"] = "test"
    """The documents that are scored: test, or validation to choose knobs."""
    eval_tokens: int = knob(0, least=0, unit="tokens")
    """Maximum number of held-out tokens to score. For text it counts bytes, also if data.bpe or
    data.tokenizer is given, so that the scored text is the same."""
    eval_stride: int | None = knob(None, least=1, unit="tokens")
    """Tokens from one evaluated window to the next; null is seq_len, without overlap. Bidirectional models
    only allow null."""
    history_targets: int = knob(0, least=0, unit="tokens")
    """Tokens predicted after histories of 1, 2, 4, … seq_len tokens; 0 for none. The tokens are held out.
    Only for causal models."""
    longer: int = knob(0, least=0, most=64, younger=True)
    """Longest sequences that a trained model is evaluated on, as a multiple of seq_len. 2, 4, 8, …: at 1, 2,
    4, … times the training length, and with longer memories if it has some; 0 for none. Only for causal
    models of text."""
    longer_targets: int = knob(2048, least=1, unit="tokens", younger=True)
    """Tokens that are scored at each of these lengths, the same at all; one group at least. A group is a
    quarter of seq_len, and its last token ends a sequence."""
    place_period: int = knob(0, least=0, unit="tokens", younger=True)
    """Length of the parts of a window for which the loss by place is measured; 0 for none."""
    attention_windows: int = knob(0, least=0, unit="windows", younger=True)
    """Held-out windows for statistics of attention after training; 0 for none. They are the distribution of
    the weights, and the error of a layer that estimates softmax attention."""
    prune_windows: int = knob(0, least=0, unit="windows", younger=True)
    """Windows of the validation split by which heads are ranked after training; 0 for none. The loss is then
    measured with fewer heads and, with stack=layer_drop, with fewer visits."""
    reach: bool = knob(False, younger=True)
    """Compute how far back the attention masks let the model read. Tasks with answers at a distance always do
    this."""
    learning_rate: float | Literal["search"] = knob(3e-3, above=0)
    """Maximum learning rate, reached after warm-up. search tries measure.search_rates and takes the best."""
    search_rates: tuple[float, ...] = knob((1e-3, 3e-3, 1e-2), above=0, entries=2, younger=True)
    """Learning rates of a search. Each trains a model of seed 0 and scores the validation split; replicates
    share the result. If the best rate is at an end, the search goes on there."""
    search_budget: Literal["smallest", "largest"] = knob("smallest", younger=True)
    """Budget of each training of a search, where there are several. With the smallest it costs least; with
    the largest it is the training of the cell, also where little is learnt before the end of it."""
    schedule: Literal["cosine", "wsd"] = knob("cosine", younger=True)
    """The learning rate after warm-up: a cosine down to a tenth, or constant with a decay to 0 in the last
    fifth of the budget."""
    train_budgets: int = knob(1, least=1, most=16, younger=True)
    """Number of budgets with a result: the training budget, its half, its quarter, … One run serves all, with
    schedule=wsd."""
    carry_state: bool = knob(False, younger=True)
    """Train on continuous text instead of random windows: each step continues the text of the previous step,
    and layers with memory keep it, as the papers on Transformer-XL and its successors train."""
    validations: int = knob(0, least=0, younger=True)
    """How often the validation split is scored during training, at equal distances."""
    keep_model: bool = knob(False, decides=False)
    """Keep the trained model, in the experiment's folder models/, for `python -m bench.generate`."""
    checkpoint_seconds: float = knob(30.0, least=0, unit="seconds", decides=False)
    """Minimum wall-clock time of training between checkpoints. A killed cell loses at most this time."""
    step: bool = knob(True, younger=True)
    """Measure a training step: its FLOPs, memory and time."""
    decode_tokens: int = knob(0, least=0, unit="tokens", younger=True)
    """Tokens that are decoded one by one after a prompt of seq_len tokens; 0 measures no decoding."""
    decode_block: int = knob(8, least=1, unit="tokens", younger=True)
    """Tokens of a block that is read in one step after the prompt, as in speculative decoding."""
    budget: int | None = knob(None, least=1, unit="bytes")
    """Memory for a training step, such as 80GiB; predictions find what fits into it."""
    reserve: float = knob(0.05, least=0, below=1, younger=True)
    """Share of measure.budget that predictions leave free, for what is not in them: the context of the
    device, libraries and fragmentation."""
    card: Literal["h100", "a100", "rtx4090", "b200"] | None = knob(None, younger=True)
    """Card for which the time of a step is estimated, with device=cuda and dtype=bfloat16; null for none."""
    limit_bytes: int | None = knob(None, least=1, unit="bytes", decides=False)
    """Memory that the cell may use on its device, such as 8GiB; null is all free memory. A cell that needs
    more is out of memory."""
    limit_seconds: float = knob(600.0, above=0, unit="seconds", decides=False)
    """Wall-clock limit of the cell. After it the cell is stopped and its status is timeout."""

    def __post_init__(self) -> None:
        finite = "a finite number: training has to end"
        self.require("train_flops", self.train_flops < math.inf, finite)
        self.require("train_seconds", self.train_seconds < math.inf, finite)
        counted = "cosine: the decay of wsd needs a budget of tokens or FLOPs"
        self.require("schedule", self.schedule == "cosine" or self.train_budget != "seconds", counted)
        one = "1: several budgets in one run need measure.schedule=wsd"
        self.require("train_budgets", self.train_budgets == 1 or self.schedule == "wsd", one)
        rates = "different rates in ascending order"
        self.require("search_rates", list(self.search_rates) == sorted(set(self.search_rates)), rates)
        several = "0 for none, or 2 or more: one has no spread"
        self.require("history_targets", self.history_targets != 1, several)
        powers = "0 for none, or a power of two from 2 to 64"
        self.require("longer", self.longer != 1 and self.longer & (self.longer - 1) == 0, powers)
        if given := [name for name, spent in self._amounts().items() if spent]:
            unspent = f"train_budget={self.train_budget} has nothing to spend"
            allowed = f"more than 0: {unspent}; give it, or take train_budget={given[0]}"
            self.require(f"train_{self.train_budget}", bool(self.train_amount), allowed)
        nothing = not (self.step or self.decode_tokens or self.train_amount)
        self.require("step", not nothing, "true: nothing else is measured")
        if self.train_amount:
            self.require("eval_tokens", self.eval_tokens >= 1, "1 or more tokens after training")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the checked knobs. Memory may be given with a unit."""
        memory = [name for name in ("budget", "limit_bytes") if values.get(name) is not None]
        return super().of({**values, **{name: parse_bytes(name, values[name]) for name in memory}})

    def _amounts(self) -> dict[str, float]:
        return {"tokens": self.train_tokens, "flops": self.train_flops, "seconds": self.train_seconds}

    @property
    def train_amount(self) -> float:
        """The training budget, in its own unit; 0 measures no quality."""
        return self._amounts()[self.train_budget]

    def decisive(self) -> dict[str, Any]:
        """Return the knobs that can change a figure, without the training budgets that are not used."""
        unspent = {f"train_{name}" for name in self._amounts() if name != self.train_budget}
        if self.learning_rate != "search":
            unspent |= {"search_rates", "search_budget"}
        values = {name: value for name, value in self.as_dict().items() if name not in unspent}
        return decisive(MeasureSpec, values)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data: a corpus, or a task that generates its own data."""

    name: str = "plays"
    params: dict[str, Any] = field(default_factory=dict)
    """All knobs of its task."""


@dataclass(frozen=True, kw_only=True)
class SlotChoice:
    """The entry that fills a slot of the model: a feed-forward layer or a depth schedule."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    """All of its knobs."""

    @classmethod
    def default(cls, slot: Slot[Any]) -> Self:
        """Return the slot's default entry with its default knobs."""
        return cls(name=slot.default, params=slot.declared(slot.default).config().as_dict())


@dataclass(frozen=True, kw_only=True)
class ClusterSpec(Spec):
    """Where cells run, and the resources of a job. It changes no figure; null is the cluster's default."""

    name: str = knob("local", decides=False)
    """Name of the group's entry, for people."""
    cells_per_job: int = knob(1, least=1, unit="cells", decides=False)
    """Cells that a job measures one after the other. More cells share the cost of its start."""
    parallel: int | None = knob(None, least=1, unit="jobs", decides=False)
    """Maximum number of jobs that run at the same time."""
    partition: str | None = knob(None, decides=False)
    """Partition of SLURM; null is the default partition."""
    address: str | None = knob(None, decides=False)
    """Address of a running Ray cluster; auto finds it on one of its machines, null starts Ray here."""
    gpus: int | None = knob(None, least=0, unit="devices", decides=False)
    """Accelerators of a job; null is 1, or 0 for cells on the CPU."""
    cpus: int | None = knob(None, least=1, unit="cores", decides=False)
    """Cores of a job; null is the cluster's default."""
    memory_gib: int | None = knob(None, least=1, unit="GiB", decides=False)
    """Host memory of a job."""
    minutes: int | None = knob(None, least=1, unit="minutes", decides=False)
    """Time limit of a job; null is the sum of its cells' measure.limit_seconds."""


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """Everything on which a cell's figures depend. Its id is a hash of all fields."""

    variant: str
    variant_params: dict[str, Any]
    seq_len: int
    depth: int
    batch_size: int
    """Sequences in a step; 0 is the largest number that fits into measure.budget."""
    replicate: int
    objective: str
    device: str
    dtype: str
    activations: str
    model: ModelSizes
    data: DataSpec
    measure: MeasureSpec
    feed_forward: SlotChoice = field(default_factory=lambda: SlotChoice.default(FEED_FORWARD))
    stack: SlotChoice = field(default_factory=lambda: SlotChoice.default(STACK))
    """The depth schedule."""
    twin: int = 0
    """Above 0: the same cell again, to measure the noise."""
    compile: str = "off"
    """See `Root.compile`."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Return the spec whose `dataclasses.asdict` these values are."""
        parts = {
            "model": ModelSizes,
            "data": DataSpec,
            "measure": MeasureSpec,
            "feed_forward": SlotChoice,
            "stack": SlotChoice,
        }
        return cls(**{**values, **{name: part(**values[name]) for name, part in parts.items()}})

    @property
    def causal(self) -> bool:
        """Whether no output may read a later token. For a task's own objectives: whether the variant and the
        depth schedule can be causal."""
        if self.objective in ("clm", "mlm"):
            return self.objective == "clm"
        variant, config, _ = self.attention()
        if not variant.info_for(config).caps.causal:
            return False
        return self.stack.name == STACK.default or self.model_spec().no_form(causal=True) is None

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile is used."""
        return self.compile != "off"

    @property
    def label(self) -> str:
        """A short description of the cell."""
        own = [f"{group}={c.name}" for group, c in self.slots().items() if c.name != SLOTS[group].default]
        words = [self.variant, *own, f"T={self.seq_len}", f"depth={self.depth}", self.activations]
        words += [f"compile={self.compile}"] * self.is_compiled
        words += [f"#{self.replicate}", *([f"twin {self.twin}"] if self.twin else [])]
        return " ".join(words)

    def attention(self) -> tuple[type[Variant], VariantConfig, Dims]:
        """Return the variant's class, its config and the sizes of its layers (imports torch)."""
        from variants.base import Dims

        variant = variants.load(self.variant)
        dims = Dims(
            seq_len=self.seq_len,
            d_model=self.model.d_model,
            heads=self.model.heads,
            device_type=self.device.partition(":")[0],
            rotary_base=self.model.rotary_base,
            head_size=self.model.head_size,
            kv_heads=self.model.kv_heads,
        )
        return variant, variant.Config.of(self.variant_params), dims

    def variants(self) -> list[str]:
        """Return the variants on whose code the figures depend: the cell's and the members of a mixture."""
        if variants.outline(self.variant):
            return [self.variant]
        try:
            variant, config, _ = self.attention()
        except variants.BrokenVariant:
            return [self.variant]
        return [self.variant, *variant.members(config)]

    def slots(self) -> dict[str, SlotChoice]:
        """Return the entries that fill the slots, by group."""
        return {FEED_FORWARD.group: self.feed_forward, STACK.group: self.stack}

    def slot_modules(self) -> list[str]:
        """Return the modules of these entries; the figures depend on their code."""
        return [SLOTS[group].module_of(choice.name) for group, choice in self.slots().items()]

    def model_spec(self) -> ModelSpec:
        """Return the parts of the model (imports torch)."""
        from bench.model.block import BlockOptions
        from bench.model.slots import ModelSpec, depth_schedule, feed_forward

        variant, config, dims = self.attention()
        layer = feed_forward(self.feed_forward.name, **self.feed_forward.params)
        if self.model.widen_feed_forward and dims.shared_parameters:
            wider = layer.layer.widened(layer.config, dims.d_model, dims.shared_parameters)
            layer = replace(layer, config=wider)
        return ModelSpec.of(
            variant,
            config,
            feed_forward=layer,
            depth=depth_schedule(self.stack.name, **self.stack.params),
            block=BlockOptions(
                norm=self.model.norm,
                norm_position=self.model.norm_position,
                residual=self.model.residual,
            ),
        )

    def workload(self) -> Workload:
        """Return the work of one forward pass of a step (imports torch)."""
        from variants.base import Workload

        return Workload(
            batch_size=max(1, self.batch_size),
            seq_len=self.seq_len,
            d_model=self.model.d_model,
            heads=self.model.heads,
            head_size=self.model.head_size,
            kv_heads=self.model.kv_heads,
            causal=self.causal,
        )

    def task(self) -> tuple[type[Task], TaskConfig, Setting]:
        """Return the task's class, its config and the cell's settings for it."""
        from bench.tasks.base import Setting

        task = tasks.load(self.data.name)
        setting = Setting(
            data=self.data.name,
            objective=self.objective,
            seq_len=self.seq_len,
            batch_size=max(1, self.batch_size),
            replicate=self.replicate,
            test_tokens=self.measure.eval_tokens if self.measure.train_amount else 0,
            test_split=self.measure.eval_split,
            is_continuous=self.measure.carry_state,
        )
        return task, task.Config.of(self.data.params), setting

    def cell_id(self, data_sha256: str, code_sha256: str) -> str:
        """Return the hash of everything on which the figures depend."""
        values = dataclasses.asdict(self)
        values["variant_params"] = _decisive_params("variant", self.variant, self.variant_params)
        values["data"]["params"] = _decisive_params("data", self.data.name, self.data.params)
        values["model"] = decisive(ModelSizes, values["model"]) | _HASHED_BEFORE_SLOTS
        for group, choice in self.slots().items():
            params = _decisive_params(group, choice.name, choice.params)
            values[group]["params"] = params
            if choice.name == SLOTS[group].default and not params:  # older cells had no other
                del values[group]
        values["measure"] = self.measure.decisive()
        return digest([decisive(Root, values), data_sha256, code_sha256])


_HASHED_BEFORE_SLOTS = {"ff_mult": 4}
"""A knob of the model that became `feed_forward.mult`. Its default stays in the hash, so that older records
are found."""


def _decisive_params(group: str, name: str, params: dict[str, Any]) -> dict[str, Any]:
    found = chosen.declared(group, name)
    return decisive(found.config, params) if found else params


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell, and where and how its record is stored."""

    spec: CellSpec
    folder: Path
    name: str
    force: bool
    """Measure it although its record is final."""
    rerun: str = "none"
    """Which final records are measured again: a value of `Root.rerun`."""
    remeasure: bool = True
    """See `Root.remeasure`."""
    audit_oom: float = 0.0
    """See `Root.audit_oom`."""
    skip_after_oom: bool = True
    """See `Root.skip_after_oom`."""
    devices: int | Literal["all"] = "all"
    """See `Root.devices`."""
    report_minutes: float | None = None
    """See `Root.report_minutes`."""
    estimate: str | None = None
    """See `Root.estimate`."""
    placed: bool = False
    """Whether a grid has chosen its place within its round."""
    only_cost: bool = False
    """Measure its cost, but not the quality after training."""
    tracker: TrackerSpec = field(default_factory=TrackerSpec)
    """The tracker to which its record is logged."""


def digest(value: Any) -> str:
    """Return 16 hex digits: the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
