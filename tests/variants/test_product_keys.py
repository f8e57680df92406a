"""A memory with product keys against a search among all keys, written by loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import D_MODEL, EXACT, assert_same, difference, numbers
from torch import Tensor

from bench.measure.flops import CountFlops
from bench.model import activations
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.base import Batch
from bench.train.step import training_step
from variants import load_mixer
from variants.base import Context, Dims
from variants.feed_forward.product_keys import ProductKeys, ProductKeysConfig

TOKENS = 5


def made(**knobs: object) -> ProductKeys:
    torch.manual_seed(0)
    return ProductKeys(ProductKeysConfig.of({"heads": 2, "n_keys": 7, "k": 3, **knobs}), D_MODEL).double()


def full_search(one: ProductKeys, x: Tensor) -> Tensor:
    """Token by token and head by head: the largest scores of all keys, of whole keys."""
    heads, count, k = one.config.heads, one.config.n_keys, one.config.k
    first, second = one.keys
    rows = []
    for token in x.flatten(0, 1):
        total = torch.zeros(D_MODEL, dtype=x.dtype)
        for head, query in enumerate((one.query.weight @ token).chunk(heads)):
            query = F.layer_norm(query, query.shape)
            keys = [torch.cat([first[head, i], second[head, j]]) for i in range(count) for j in range(count)]
            best, slots = (torch.stack(keys) @ query).topk(k)
            total = total + best.softmax(-1) @ one.out.weight[slots]
        rows.append(total)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("knobs", [{}, {"k": 7}, {"k": 1}, {"heads": 1, "query_size": 2}])
def test_it_is_a_search_among_all_slots(knobs: dict[str, int]) -> None:
    """In outputs and gradients."""
    one, x = made(**knobs), numbers(2, TOKENS, D_MODEL)
    assert_same(lambda: one(x).y, lambda: full_search(one, x), [x, *one.parameters()])


def test_a_memory_that_is_read_whole_is_attention_to_its_slots() -> None:
    """With k = n = 1 the only value, once a head."""
    one, x = made(n_keys=1, k=1), numbers(1, TOKENS, D_MODEL).detach()
    assert difference(one(x).y, 2 * one.out.weight[None].expand(1, TOKENS, -1)) <= EXACT


def test_values_that_no_query_reads_have_no_gradient() -> None:
    one, x = made(), numbers(1, 1, D_MODEL).detach()
    one(x).y.sum().backward()
    read = one.out.weight.grad.abs().sum(-1).nonzero().flatten()  # type: ignore[union-attr]
    assert torch.equal(read, one.choices(x, Context(causal=True)).flatten().unique())
    assert one.active_parameters() == one.query.weight.numel() + one.keys.numel() + 2 * 3 * D_MODEL


def test_more_slots_than_sub_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^k=9: allowed is up to n_keys=8$"):
        ProductKeysConfig(k=9, n_keys=8)


def test_a_token_reads_few_values() -> None:
    """Bytes of one token do not grow with the table of values."""
    moved = []
    for count in (32, 64):
        one = ProductKeys(ProductKeysConfig(n_keys=count, k=4), 16).eval()
        with CountFlops() as counter, torch.no_grad():
            one(torch.zeros(1, 1, 16))
        moved.append(counter.counts.bytes_moved)
    sub_keys = 4 * 2 * 4 * 32 * 4  # bytes of 32 sub-keys of each kind and head
    assert moved[1] - moved[0] < 3 * sub_keys


@pytest.mark.parametrize("strategy", ["checkpoint", "sqrt", "selective", "reversible"])
def test_a_recomputed_pass_reads_the_same_slots(strategy: str) -> None:
    mixer = load_mixer("dense")
    spec = ModelSpec.of(mixer, mixer.Config(), feed_forward=feed_forward("product_keys", n_keys=8, k=4))
    tokens = torch.randint(11, (2, 2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(run: activations.Run) -> list[Tensor]:
        torch.manual_seed(0)
        model = LanguageModel(
            spec,
            Dims(seq_len=12, d_model=D_MODEL, heads=2),
            depth=3,
            dropout=0.1,
            vocabulary=11,
            activations="keep",
            ff_chunks=2,
        ).double()
        torch.manual_seed(1)
        with model.running(run):
            training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), Batch(*tokens), causal=True)
        return [p.grad for p in model.parameters() if p.grad is not None]

    how = activations.STRATEGIES[strategy]
    got, want = gradients(how.run), gradients(how.stored)
    scale = max(float(g.abs().max()) for g in want)
    assert max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) <= 1e-9 * scale
