"""Feed-forward layers of experts: identities, capacity, the balance loss, and their operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import D_MODEL, EXACT, assert_same, difference, numbers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import variants
from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.model.activations import STRATEGIES
from bench.model.decode import Decoder, no_decoding
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from variants.base import Dims, FeedForward, FeedForwardConfig, Workload
from variants.feed_forward.glu import GLU, GLUConfig
from variants.feed_forward.mlp import MLP, MLPConfig
from variants.feed_forward.switch import Switch, SwitchConfig
from variants.feed_forward.top_k import TopK, TopKConfig
from variants.ops import experts
from variants.ops.routed_experts import RoutedConfig, RoutedExperts
from variants.slots import FEED_FORWARD

VOCABULARY, TOKENS = 19, 33
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("switch", {}),
    ("switch", {"capacity_factor": 1.0}),
    ("switch", {"capacity_factor": 0.4, "n_experts": 3, "expert": "glu"}),
    ("top_k", {}),
    ("top_k", {"k": 3, "n_experts": 5, "n_shared": 2, "expert": "glu", "normalised": False, "width": 5}),
]
every_config = pytest.mark.parametrize(("name", "knobs"), CONFIGS, ids=str)


def made(name: str, knobs: dict[str, Any], d_model: int = D_MODEL) -> RoutedExperts:
    """A float64 layer."""
    torch.manual_seed(0)
    layer = FEED_FORWARD.load(name)
    one = layer(layer.Config.of(knobs), d_model).double()
    assert isinstance(one, RoutedExperts)
    return one


def plain(layer: RoutedExperts, expert: int) -> FeedForward:
    """The layer that is one expert."""
    config, count = layer.config, layer.config.n_experts
    kind: type[FeedForward] = GLU if config.expert == "glu" else MLP
    own: FeedForwardConfig = kind.Config.of({"width": layer.hidden})
    one: Any = kind(own, layer.d_model).double()
    with torch.no_grad():
        one.up.weight.copy_(layer.up.weight.chunk(count)[expert])
        one.out.weight.copy_(layer.out.weight.chunk(count)[expert])
    result: FeedForward = one
    return result


def model_of(name: str, knobs: dict[str, Any], activations: str = "keep", **options: Any) -> LanguageModel:
    """A float64 model."""
    dense = variants.load("dense")
    spec = ModelSpec.of(dense, dense.Config(), feed_forward=feed_forward(name, **knobs))
    torch.manual_seed(0)
    dims = Dims(seq_len=TOKENS, d_model=D_MODEL, heads=2)
    options = {"depth": 2, "dropout": 0.0, "vocabulary": VOCABULARY} | options
    return LanguageModel(spec, dims, activations=activations, **options).double()


# --- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["mlp", "glu"])
@pytest.mark.parametrize(("name", "knobs"), [("switch", {}), ("top_k", {"k": 1, "normalised": False})])
def test_a_single_expert_is_the_plain_layer(name: str, knobs: dict[str, Any], expert: str) -> None:
    one = made(name, {"n_experts": 1, "expert": expert} | knobs)
    x = numbers(2, 9, D_MODEL)
    assert_same(lambda: one(x).y, lambda: plain(one, 0)(x).y, [x])


@pytest.mark.parametrize("normalised", [True, False])
def test_all_experts_are_a_weighted_sum(normalised: bool) -> None:
    one = made("top_k", {"k": 4, "n_experts": 4, "normalised": normalised})
    x = numbers(2, 9, D_MODEL)

    def total() -> Tensor:
        weights = F.linear(x, one.router.weight).softmax(-1)
        parts = [plain(one, e)(x).y * weights[..., e, None] for e in range(4)]
        return torch.stack(parts).sum(0)

    assert_same(lambda: one(x).y, total, [x, one.router.weight])


def test_shared_experts_are_added_to_the_chosen_ones() -> None:
    with_shared = made("top_k", {"n_shared": 2, "width": 7})
    x = numbers(2, 9, D_MODEL)
    up, out = with_shared.shared_up.weight, with_shared.shared_out.weight
    one = MLP(MLPConfig(width=14), D_MODEL).double()
    one.load_state_dict({"up.weight": up, "out.weight": out})
    without = made("top_k", {"width": 7})
    without.load_state_dict({k: v for k, v in with_shared.state_dict().items() if "shared" not in k})
    assert difference(with_shared(x).y, without(x).y + one(x).y) <= EXACT


@every_config
def test_the_fast_path_is_the_reference(name: str, knobs: dict[str, Any]) -> None:
    one, x = made(name, knobs), numbers(2, TOKENS, D_MODEL)
    assert_same(lambda: one(x).y, lambda: one.reference(x), [x, *one.parameters()])
    layer, cpu = FEED_FORWARD.load(name), torch.device("cpu")
    assert gates.feed_forward_error(layer, one.config, D_MODEL, cpu) < 1e-5
    gates.feed_forward_dtype_errors(layer, one.config, 64, cpu, torch.bfloat16)


def test_a_gate_finds_wrong_choices() -> None:
    class Wrong(Switch):
        def _choose(self, logits: Tensor) -> Tensor:
            shift = int(logits.dtype == torch.float32)
            return (super()._choose(logits) + shift) % self.config.n_experts

    with pytest.raises(gates.GateFailed, match="choices differ"):
        gates.feed_forward_error(Wrong, SwitchConfig(), D_MODEL, torch.device("cpu"))


# --- capacity --------------------------------------------------------------------------------------


def test_a_large_capacity_drops_nothing() -> None:
    x = numbers(2, TOKENS, D_MODEL)
    free, wide = made("switch", {}), made("switch", {"capacity_factor": 8})
    assert_same(lambda: wide(x).y, lambda: free(x).y, [x])


def test_tokens_over_the_capacity_get_0_and_the_others_what_they_had() -> None:
    x = numbers(2, TOKENS, D_MODEL).detach()
    free, full = made("switch", {}), made("switch", {"capacity_factor": 1})
    capacity = full.capacity(TOKENS)
    assert capacity == 5  # 33 tokens, 8 experts
    chosen = F.linear(x, free.router.weight).argmax(-1)
    dropped = torch.zeros(2, TOKENS, dtype=torch.bool)
    for b in range(2):
        for t in range(TOKENS):
            dropped[b, t] = int((chosen[b, :t] == chosen[b, t]).sum()) >= capacity
    assert 0 < dropped.sum() < dropped.numel()
    y = full(x).y
    assert not y[dropped].any()
    assert difference(y[~dropped], free(x).y[~dropped]) <= EXACT


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.25])
def test_later_tokens_and_other_sequences_displace_nobody(factor: float) -> None:
    one = made("switch", {"capacity_factor": factor})
    x, other = numbers(2, TOKENS, D_MODEL).detach(), numbers(2, TOKENS, D_MODEL, seed=5).detach()
    y = one(x).y
    for cut in (1, 7, TOKENS - 1):
        changed = torch.cat([x[:, :cut], other[:, cut:]], dim=1)
        assert difference(one(changed).y[:, :cut], y[:, :cut]) <= EXACT
    assert difference(one(torch.stack([other[0], x[1]])).y[1], y[1]) <= EXACT


def test_a_leak_of_the_papers_order_is_seen() -> None:
    """Places that are given to the last tokens first: the perturbation above would show it."""
    one = made("switch", {"capacity_factor": 0.4})
    x, other = numbers(1, TOKENS, D_MODEL).detach(), numbers(1, TOKENS, D_MODEL, seed=5).detach()
    changed = torch.cat([x[:, :7], other[:, 7:]], dim=1)
    backwards = [one(z.flip(1)).y.flip(1)[:, :7] for z in (x, changed)]
    assert difference(*backwards) > 1e-3


# --- the balance loss ------------------------------------------------------------------------------


def routed_by_channel(name: str, knobs: dict[str, Any]) -> RoutedExperts:
    """Channel c is the score of expert c."""
    one = made(name, knobs)
    with torch.no_grad():
        nn.init.eye_(one.router.weight)
    return one


@pytest.mark.parametrize(("name", "k"), [("switch", 1), ("top_k", 2)])
def test_the_balance_loss_is_its_weight_if_tokens_are_spread_evenly(name: str, k: int) -> None:
    one = routed_by_channel(name, {"balance": 0.25})
    x = sum(torch.eye(8, D_MODEL, dtype=torch.float64).roll(-i, 0) for i in range(k))
    even = one(3 * x[None]).aux_loss
    assert even is not None
    assert even.dim() == 0
    assert abs(even.item() - 0.25) < 1e-12


def test_the_balance_loss_of_one_loaded_expert() -> None:
    """E times the probability of the only expert that is chosen; its gradient lowers the probability."""
    one = routed_by_channel("switch", {"balance": 0.25})
    x = torch.zeros(1, 5, D_MODEL, dtype=torch.float64)
    x[..., 0] = 2
    loss = one(x).aux_loss
    probability = x[0, 0, :8].softmax(0)[0].item()
    assert loss is not None
    assert abs(loss.item() - 0.25 * 8 * probability) < 1e-12
    (grad,) = torch.autograd.grad(loss, one.router.weight)
    assert grad[0, 0] > 0 > grad[1, 0]
    assert one(x).y.requires_grad


def test_without_a_weight_there_is_no_balance_loss() -> None:
    assert made("switch", {"balance": 0})(numbers(1, 3, D_MODEL)).aux_loss is None


# --- knobs, parameters, cost -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"k": 9}, r"^k=9: allowed is up to n_experts=8$"),
        ({"k": 1}, r"^k=1: allowed is 2 or more, or normalised=false$"),
        ({"n_shared": -1}, r"^n_shared=-1: allowed is 0 or more experts$"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TopKConfig.of(knobs)


def test_experts_together_are_as_wide_as_the_layer_that_they_replace() -> None:
    assert SwitchConfig(mult=4).hidden(64) == MLPConfig(mult=4).hidden(64)
    assert SwitchConfig(mult=4, expert="glu").hidden(64) == GLUConfig(mult=4).hidden(64)
    assert TopKConfig(mult=4).hidden(64) == 128
    assert TopKConfig(mult=4, n_shared=2).hidden(64) == 64
    assert TopKConfig(mult=1, width=3).hidden(64) == 3


def test_active_parameters_are_those_of_the_experts_of_a_token() -> None:
    one = made("switch", {"n_experts": 4, "width": 7})
    router, expert = 4 * D_MODEL, 2 * 7 * D_MODEL
    assert sum(p.numel() for p in one.parameters()) == router + 4 * expert
    assert one.active_parameters() == router + expert
    both = made("top_k", {"n_experts": 4, "n_shared": 1, "width": 7, "expert": "glu"})
    assert both.active_parameters() == router + (2 + 1) * 3 * 7 * D_MODEL
    layer = MLP(MLPConfig(), D_MODEL)
    assert layer.active_parameters() == sum(p.numel() for p in layer.parameters())
    model = model_of("switch", {"n_experts": 4, "width": 7})
    assert model.active_parameters() == sum(p.numel() for p in model.parameters()) - 2 * 3 * expert


@pytest.mark.parametrize("config", [SwitchConfig(), TopKConfig(n_shared=1), TopKConfig(expert="glu")])
def test_a_wider_layer_has_about_as_many_more_parameters(config: RoutedConfig) -> None:
    layer: type[RoutedExperts] = Switch if isinstance(config, SwitchConfig) else TopK
    sizes = [
        sum(p.numel() for p in layer(each, D_MODEL).parameters())
        for each in (config, layer.widened(config, D_MODEL, 5000))
    ]
    channel = config.products * (config.n_experts + config.routes.shared) * D_MODEL
    assert abs(sizes[1] - sizes[0] - 5000) <= channel / 2


@every_config
def test_dispatched_flops_are_those_of_the_active_experts(name: str, knobs: dict[str, Any]) -> None:
    """Forward, and twice as many backward; on fake tensors too."""
    work = Workload(batch_size=3, seq_len=TOKENS, d_model=D_MODEL, heads=1, causal=True)
    one = made(name, knobs)
    cost = one.cost(work)
    with CountFlops() as counter:
        out = one(numbers(3, TOKENS, D_MODEL))
        assert counter.total == cost.total
        (out.y.sum() + out.aux_loss).backward()
    assert counter.total == cost.step
    with FakeTensorMode(), CountFlops() as counter:
        type(one)(one.config, D_MODEL)(torch.zeros(3, TOKENS, D_MODEL))
    assert counter.total == cost.total


def test_more_experts_cost_only_their_routing() -> None:
    work = Workload(batch_size=1, seq_len=5, d_model=4, heads=1, causal=True)
    few, many = (
        Switch(SwitchConfig(n_experts=n, width=6), 4).cost(work).parts["feed_forward"] for n in (2, 64)
    )
    assert few == 5 * 2 * 4 * (2 + 2 * 6)
    assert many - few == 5 * 2 * 4 * 62


# --- operators -------------------------------------------------------------------------------------


def test_the_operators_are_products_by_rows() -> None:
    """An expert without rows, and rows without an expert."""
    x, weight = numbers(7, 4), numbers(3, 5, 4, seed=2)
    ends = torch.tensor([2, 2, 6])
    owner = [0, 0, 2, 2, 2, 2, None]

    def by_rows() -> Tensor:
        zero = torch.zeros(5, dtype=torch.float64)
        return torch.stack([zero if e is None else weight[e] @ x[r] for r, e in enumerate(owner)])

    assert_same(lambda: experts.expert_linear(x, weight, ends), by_rows, [x, weight])
    torch.library.opcheck(experts.expert_linear, (x, weight, ends))
    torch.library.opcheck(experts.expert_outer, (numbers(7, 5).detach(), x.detach(), ends))


@every_config
def test_a_million_tokens_on_fake_tensors(name: str, knobs: dict[str, Any]) -> None:
    layer = FEED_FORWARD.load(name)
    with FakeTensorMode():
        x = torch.randn(1, 2**20, 64, requires_grad=True)
        out = layer(layer.Config.of(knobs), 64)(x)
        (out.y.sum() + out.aux_loss).backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("name", "knobs"),
    [CONFIGS[1], *(pytest.param(*case, marks=pytest.mark.slow) for case in CONFIGS[2:])],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_is_one_graph(name: str, knobs: dict[str, Any]) -> None:
    one, x = made(name, knobs), numbers(2, TOKENS, D_MODEL)
    graph = torch.compile(one, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(lambda: graph(x).y, lambda: one(x).y, [x, *one.parameters()])
    assert_same(lambda: graph(x).aux_loss, lambda: one(x).aux_loss, [x, one.router.weight])


# --- models ----------------------------------------------------------------------------------------


def gradients(model: LanguageModel) -> list[Tensor]:
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    model.zero_grad(set_to_none=True)
    out = model(ids, causal=True)
    torch.autograd.backward([F.cross_entropy(out.logits.flatten(0, 1), ids.flatten()), *out.aux_losses])
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("activations", [n for n, s in STRATEGIES.items() if not s.needs_device])
@pytest.mark.parametrize("ff_chunks", [1, 3])
def test_every_strategy_gives_the_same_gradients(activations: str, ff_chunks: int) -> None:
    model = model_of("switch", {}, activations, ff_chunks=ff_chunks)
    got = gradients(model)
    with model.running(STRATEGIES[activations].stored):
        want = gradients(model)
    assert len(got) == len([*model.parameters()])
    for a, b in zip(got, want, strict=True):
        assert difference(a, b) <= EXACT


def test_selective_activations_keep_the_products_of_experts() -> None:
    counts = []
    for activations in ("keep", "selective"):
        model = model_of("switch", {}, activations)
        with CountFlops() as counter:
            gradients(model)
        counts.append(counter.total)
    assert counts[0] == counts[1]


def test_the_balance_loss_of_a_sequence_in_chunks_is_a_mean() -> None:
    """As large as that of a whole sequence, not a multiple of it: here each chunk is balanced."""
    losses = []
    for chunks in (1, 3):
        model = model_of("switch", {"balance": 1.0}, ff_chunks=chunks)
        with torch.no_grad():
            for block in model.blocks:
                block.feed_forward.router.weight.zero_()  # type: ignore[union-attr]  # P = 1/E
        out = model(torch.zeros(1, TOKENS, dtype=torch.long), causal=True)
        losses.append(torch.stack(out.aux_losses).detach())
    torch.testing.assert_close(losses[0], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(("name", "knobs"), [CONFIGS[0], CONFIGS[4]], ids=str)
def test_decoding_gives_the_logits_of_the_parallel_pass(name: str, knobs: dict[str, Any]) -> None:
    model = model_of(name, knobs).eval()
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    with torch.no_grad():
        want = model(ids, causal=True).logits
    decoder = Decoder(model, 2, TOKENS)
    got = [decoder.read_all(piece) for piece in ids.split([17, *[1] * 12, 4], dim=1)]
    assert (torch.cat(got, dim=1) - want).abs().max() <= 1e-6 * want.abs().max()


def test_a_capacity_excludes_decoding_and_chunks() -> None:
    model = model_of("switch", {"capacity_factor": 1.0})
    reason = "switch drops tokens over an expert's capacity, which depends on the length of the sequence"
    assert no_decoding(model) == reason
    assert model.spec.unsupported(2, D_MODEL) is None
    assert model.spec.unsupported(2, D_MODEL, ff_chunks=3) == (
        f"{reason}, and ff_chunks=3 divides it; allowed is 1"
    )
    free = replace(model.spec, layers=model_of("switch", {}).spec.layers)
    assert free.unsupported(2, D_MODEL, ff_chunks=3) is None


def test_every_expert_is_a_launch_of_each_product() -> None:
    """Forward two products, backward two for each of them."""

    def launches(n_experts: int) -> int:
        one = made("switch", {"n_experts": n_experts})
        with CountFlops() as counter:
            one(numbers(1, 8, D_MODEL)).y.sum().backward()
        return counter.counts.launches

    assert launches(6) - launches(4) == 2 * (2 + 4)


# --- load ------------------------------------------------------------------------------------------


@every_config
def test_the_load_counts_the_assignments_of_a_pass(name: str, knobs: dict[str, Any]) -> None:
    one, x = made(name, knobs), numbers(2, TOKENS, D_MODEL).detach()
    load, chosen = one.load(x), one._choose(one._logits(x))
    assert load.assigned.tolist() == [int((chosen == expert).sum()) for expert in range(one.config.n_experts)]
    if one.routes.capacity_factor is None:
        assert load.dropped is None
    else:
        dropped = ~one(x).y.any(-1)
        assert 0 < int(dropped.sum()) == load.dropped
