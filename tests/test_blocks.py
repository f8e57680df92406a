"""Options of the blocks (norms, their position, ReZero) and factorised embeddings, against their formulas."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

import variants
from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import CellSpec
from bench.inputs.errors import ConfigError
from bench.measure import recompute_gate
from bench.measure.flops import CountFlops
from bench.measure.predict import Prediction, build_model
from bench.model.activations import STRATEGIES
from bench.model.block import BlockOptions
from bench.model.decode import Decoder
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from bench.train.step import decayed_parameters, optimizer_for, training_step
from variants.base import Context, Workload

T, WIDTH, VOCABULARY = 20, 16, 23
OPTIONS = [
    BlockOptions(norm=norm, norm_position=position, residual=residual)  # type: ignore[arg-type]
    for norm, position, residual in product(("layer", "rms", "none"), ("pre", "post"), ("plain", "rezero"))
    if norm != "none" or position == "pre"
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(vars(o).values()))


def model_of(
    options: BlockOptions, *, name: str = "dense", knobs: dict[str, Any] | None = None, **changed: Any
) -> LanguageModel:
    """With random norms and scales, so that none of them is the identity."""
    variant = variants.load(name)
    torch.manual_seed(0)
    spec = ModelSpec.of(
        variant, variant.Config.of(knobs or {}), feed_forward=feed_forward(mult=2), block=options
    )
    sizes: dict[str, Any] = {"depth": 3, "dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep"}
    model = LanguageModel(
        spec, Workload(batch_size=2, seq_len=T, d_model=WIDTH, heads=2, causal=True), **sizes | changed
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "scale" in key:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return model


def ids(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(seed))


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    """The formulas of the papers, by the class of the norm."""
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.RMSNorm):
        assert norm.weight is not None
        return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * norm.weight
    assert isinstance(norm, nn.LayerNorm)
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * norm.weight + norm.bias


@every_option
def test_a_block_is_its_formula(options: BlockOptions) -> None:
    """Logits and gradients, with the sums written out."""
    model, kind = model_of(options).double(), {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": nn.Identity}
    ctx, is_pre = Context(causal=True), options.norm_position == "pre"
    x = model.embedding(ids())
    for block in model.visits:
        for norm, branch in (
            (block.mixer_norm, lambda x, b=block: b.mixer(x, ctx).y),
            (block.feed_forward_norm, lambda x, b=block: b.feed_forward(x).y),
        ):
            assert isinstance(norm, kind[options.norm])
            y = branch(normalised(x, norm) if is_pre else x)
            if options.residual == "rezero":
                y = y * block.branch_scale
            else:
                assert block.branch_scale is None
            x = x + y if is_pre else normalised(x + y, norm)
    want = model.head(normalised(x, model.norm) if is_pre else x)
    got = model(ids(), causal=True).logits.double()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    pair = (torch.autograd.grad(each.square().sum(), parameters, retain_graph=True) for each in (got, want))
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def test_usual_blocks_have_the_parameters_they_always_had() -> None:
    """Their names are keys of checkpoints and kept models."""
    model = model_of(BlockOptions(), depth=1)
    assert [key for key in model.state_dict() if "mixer." not in key and "feed_forward." not in key] == [
        "embedding.weight",
        "blocks.0.mixer_norm.weight",
        "blocks.0.mixer_norm.bias",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward_norm.bias",
        "norm.weight",
        "norm.bias",
        "head.weight",
    ]


def gradients(model: LanguageModel) -> list[Tensor]:
    torch.manual_seed(1)
    training_step(model.train(), optimizer_for(model, 0.0), Batch(ids(), ids(1)), causal=True)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@every_option
@pytest.mark.parametrize("activations", [name for name, own in STRATEGIES.items() if not own.needs_device])
def test_every_strategy_has_the_gradients_of_stored_activations(
    options: BlockOptions, activations: str
) -> None:
    """With dropout, and the feed-forward layer in pieces."""
    model = model_of(options, activations=activations, dropout=0.1, ff_chunks=3)
    reason = model.spec.conflict(3, activations)
    if activations == "reversible" and options.norm_position == "post":
        assert reason is not None
        assert reason.startswith("activations=reversible: rebuilds the inputs of a block by subtraction")
        return
    assert reason is None
    got = gradients(model)
    with model.running(STRATEGIES[activations].stored):
        want = gradients(model)
    largest = max(grad.abs().max() for grad in want)
    assert all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(got, want, strict=True))
    assert all(grad.abs().max() > 0 for grad in got)


@every_option
@pytest.mark.parametrize("embedding_size", [None, 6])
def test_every_option_decodes_the_network_it_trains(
    options: BlockOptions, embedding_size: int | None
) -> None:
    model = model_of(options, embedding_size=embedding_size).double().eval()
    decoder = Decoder(model, 2, T)
    with torch.no_grad():
        want = model(ids(), causal=True).logits
    got = [decoder.read_all(ids()[:, :9]), *map(decoder.read_all, ids()[:, 9:].split(1, 1))]
    torch.testing.assert_close(torch.cat(got, 1).float(), want, rtol=1e-5, atol=1e-5)


def test_rezero_starts_with_blocks_that_do_nothing_and_trains_them() -> None:
    options = BlockOptions(norm="none", residual="rezero")
    variant = variants.load("dense")
    torch.manual_seed(0)
    sizes = Workload(batch_size=2, seq_len=T, d_model=WIDTH, heads=2, causal=True)
    spec = ModelSpec.of(variant, variant.Config(), block=options)
    model = LanguageModel(spec, sizes, depth=3, dropout=0.0, vocabulary=VOCABULARY, activations="keep")
    logits = model(ids(), causal=True).logits
    assert torch.equal(logits, model.head(model.embedding(ids())))
    scales = [block.branch_scale for block in model.visits]
    assert [scale.shape for scale in scales if scale is not None] == [torch.Size([])] * 3, "one for a block"
    assert not {*scales} & decayed_parameters(model)
    optimizer, batch = optimizer_for(model, 1e-2), Batch(ids(), ids(1))
    training_step(model, optimizer, batch, causal=True)
    for name, parameter in model.blocks.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith("branch_scale")
    training_step(model, optimizer, batch, causal=True)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()


@every_option
@pytest.mark.parametrize("embedding_size", [None, 6])
def test_the_first_loss_is_that_of_a_guess(options: BlockOptions, embedding_size: int | None) -> None:
    """With the initial weights. After a norm, logits have a standard deviation of about a half."""
    variant = variants.load("dense")
    torch.manual_seed(0)
    sizes = Workload(batch_size=2, seq_len=T, d_model=WIDTH, heads=2, causal=True)
    model = LanguageModel(
        ModelSpec.of(variant, variant.Config(), block=options),
        sizes,
        depth=8,
        dropout=0.0,
        vocabulary=VOCABULARY,
        activations="keep",
        embedding_size=embedding_size,
    )
    loss = nn.functional.cross_entropy(model(ids(), causal=True).logits.flatten(0, 1), ids(1).flatten())
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_factorised_embedding_is_two_products(tied: bool) -> None:
    model = model_of(BlockOptions(), embedding_size=6, tie_embeddings=tied).double()
    usual = model_of(BlockOptions(), tie_embeddings=tied)
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, usual)]
    tables = 1 if tied else 2
    assert counts[0] - counts[1] == 2 * 6 * WIDTH - tables * VOCABULARY * (WIDTH - 6)
    assert (model.head.weight is model.embedding.weight) == tied
    assert model.embedding_map is not None
    assert model.head_map is not None
    one_hot = nn.functional.one_hot(ids(), VOCABULARY).double()
    x = one_hot @ model.embedding.weight @ model.embedding_map.weight.T
    torch.testing.assert_close(model.embed(ids()), x)
    y = model.norm(model.run_visits(x, None, Context(causal=True)).y)
    want = y @ model.head_map.weight.T @ model.head.weight.T
    torch.testing.assert_close(model(ids(), causal=True).logits.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "overlapping", "transformer_xl"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_factorised_embedding_are_those_dispatched(name: str, tied: bool) -> None:
    """Also where windows overlap, so that tokens are embedded several times."""
    knobs = {
        "overlapping": {"chunk": 8},
        "transformer_xl": {"segment": 8, "mem_len": 8},
        "dense": {"impl": "naive"},
    }
    models = [
        model_of(BlockOptions(), name=name, knobs=knobs[name], embedding_size=size, tie_embeddings=tied)
        for size in (6, None)
    ]
    work = Workload(batch_size=2, seq_len=T, d_model=WIDTH, heads=2, causal=False)
    causal = variants.load(name).info.caps.causal
    counted = []
    for model in models:
        with CountFlops() as counter, torch.no_grad():
            for _ in model.stream(ids(), causal=causal):
                pass
        counted.append(counter.total)
    costs = [model.cost(work) for model in models]
    assert counted[0] - counted[1] == costs[0].total - costs[1].total
    assert costs[0].mixing == costs[1].mixing, "products of single tokens are no exchange between tokens"


def test_a_factorised_embedding_has_the_initial_variance_of_a_usual_one() -> None:
    """Of hidden states and of logits; their standard deviations over 4,000 and 128,000 numbers."""
    variant = variants.load("dense")
    sizes = Workload(batch_size=1, seq_len=64, d_model=64, heads=2, causal=True)
    spread = []
    for size in (None, 32):
        torch.manual_seed(0)
        spec = ModelSpec.of(variant, variant.Config())
        model = LanguageModel(
            spec,
            sizes,
            depth=1,
            dropout=0.0,
            vocabulary=2000,
            activations="keep",
            embedding_size=size,
        )
        tokens = torch.arange(64)[None]
        spread.append([model.embed(tokens).std().item(), model(tokens, causal=True).logits.std().item()])
    assert spread[1] == pytest.approx(spread[0], rel=0.15)


TINY = ["data=stdlib", "measure=plan", "seq_len=16", "depth=2", "model.d_model=16", "device=cpu"]
OTHER = {
    "rms": ["model.norm=rms"],
    "post": ["model.norm_position=post"],
    "rezero": ["model.residual=rezero", "model.norm=none"],
    "factorised": ["model.embedding_size=8"],
    "usual": [],
}


def cell(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=[*TINY, *overrides])).spec


def test_every_option_decides_a_cells_id_and_its_default_does_not() -> None:
    found = {cell(*options).cell_id("data", "code") for options in OTHER.values()}
    assert len(found) == len(OTHER)
    usual = [
        "model.norm=layer",
        "model.norm_position=pre",
        "model.residual=plain",
        "model.embedding_size=null",
    ]
    assert cell(*usual).cell_id("data", "code") == cell().cell_id("data", "code")


def test_the_command_line_builds_and_plans_the_model() -> None:
    built = {name: build_model(cell(*options)) for name, options in OTHER.items()}
    assert isinstance(built["rms"].norm, nn.RMSNorm)
    assert built["rms"].spec.block == BlockOptions(norm="rms")
    assert built["post"].spec.block == BlockOptions(norm_position="post")
    assert isinstance(built["post"].norm, nn.Identity)
    assert built["rezero"].spec.block == BlockOptions(norm="none", residual="rezero")
    assert built["factorised"].embedding.embedding_dim == 8
    figures = {name: Prediction(cell(*options)).predict() for name, options in OTHER.items()}
    assert figures["rms"].param_bytes == figures["usual"].param_bytes - 4 * 16 * 5, "no biases"
    assert figures["post"].param_bytes == figures["usual"].param_bytes - 4 * 16 * 2, "no last norm"
    assert figures["rezero"].param_bytes == figures["usual"].param_bytes - 4 * (16 * 2 * 5 - 2)
    assert figures["rezero"].launches_step != figures["usual"].launches_step


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.norm=none", "model.norm_position=post"], r"^model.norm_position='post': allowed is pre"),
        (["model.embedding_size=17"], r"^model.embedding_size=17: allowed is null or at most d_model=16"),
        (["model.norm=batch"], r"^model.norm='batch': "),
        (
            ["model.norm_position=post", "activations=reversible"],
            r"^activations=reversible: .*; allowed is model.norm_position=pre$",
        ),
    ],
)
def test_what_no_model_can_have_is_refused_in_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cell(*overrides)


def test_gates_check_branches_that_compute_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the initial scales of 0, no gradient would reach the blocks."""
    step, seen = recompute_gate.training_step, []

    def watched(model: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        out = step(model, *args, **kwargs)
        seen.append(min(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None))
        return out

    monkeypatch.setattr(recompute_gate, "training_step", watched)
    spec = cell("model.residual=rezero", "model.norm=none", "activations=reversible")
    _, _, dims = spec.attention()
    recompute_gate.recompute_error(spec, dims, 2, torch.device("cpu"))
    assert len(seen) == 2
    assert min(seen) > 0
