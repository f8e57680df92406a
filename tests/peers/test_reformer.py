"""Reformer's chunks beside reformer-pytorch and transformers.

Taken away: our rotary positions. Both read our buckets.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.reformer import Reformer, ReformerConfig
from variants.ops.lsh.hashing import factors, hash_rows, rotations

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]

both_directions = pytest.mark.parametrize("causal", [True, False])


def as_theirs(buckets: Tensor, heads: int, n_buckets: int) -> Tensor:
    """(R, H·B, T), each round from 0 → (B, H, R·T), each round from n_buckets more than the one before."""
    offset = n_buckets * torch.arange(buckets.shape[0])[:, None, None]
    return (buckets + offset).unflatten(1, (heads, -1)).permute(2, 1, 0, 3).flatten(2)


@pytest.mark.parametrize("n_buckets", [2, 8, 96])
def test_hashing_equals_transformers(n_buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same rotations the same buckets. Theirs counts the first of two rotations in ones, ours the
    second."""
    transformers = peer("transformers")
    package = peer("transformers.models.reformer.modeling_reformer")
    dims, rounds, parts = dims_for(200, 2), 3, factors(n_buckets)
    x = numbers(2, 200, dims.heads, dims.head_dim).detach().float()
    given = rotations(dims.heads, dims.head_dim, rounds, parts, x.device)
    ours = hash_rows(x, given, rounds)
    config = transformers.ReformerConfig(
        **sizes(dims),
        attention_head_size=dims.head_dim,
        num_buckets=n_buckets if len(parts) == 1 else list(reversed(parts)),
    )
    other = package.LSHSelfAttention(config)
    by_round = [r.unflatten(-1, (rounds, -1)) for r in reversed(given)]
    monkeypatch.setattr(package.torch, "randn", lambda *_args, **_kwargs: torch.cat(by_round, dim=-1))
    theirs = other._hash_vectors(x.transpose(1, 2), rounds, None)
    assert torch.equal(theirs, as_theirs(ours, dims.heads, n_buckets))
    assert len(ours.unique()) > min(n_buckets, 8) // 2


@both_directions
@pytest.mark.parametrize("n_hashes", [1, 2, 5])
@pytest.mark.parametrize(("tokens", "chunk"), [(64, 8), (24, 2), (60, 5)])
def test_equals_reformer_pytorch(causal: bool, n_hashes: int, tokens: int, chunk: int) -> None:
    """Random hashing and any number of rounds, with its options for masking other buckets and counting
    each pair once. It divides by the count by logarithms, with 10⁻⁹ added to it."""
    package = peer("reformer_pytorch.reformer_pytorch")
    dims, n_buckets = dims_for(tokens, 2), tokens // chunk
    config = ReformerConfig(n_hashes=n_hashes, chunk=chunk, n_buckets=n_buckets, neighbourhood="chunk")
    layer = make_layer(Reformer, config, dims)
    assert isinstance(layer, Reformer)
    other = package.LSHAttention(
        bucket_size=chunk,
        n_hashes=n_hashes,
        causal=causal,
        allow_duplicate_attention=False,
        attend_across_buckets=False,
    )
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        qk, value = (
            t.unflatten(-1, (dims.heads, -1)).transpose(1, 2).flatten(0, 1)
            for t in (layer.qk(x), layer.value(x))
        )
        torch.manual_seed(2)
        buckets = layer._buckets(x, layer.qk(x).unflatten(-1, (dims.heads, -1)))
        given = as_theirs(buckets, dims.heads, n_buckets).flatten(0, 1)
        other.hash_vectors = lambda *_args, **_kwargs: given
        y = other(qk, value)[0].unflatten(0, (-1, dims.heads)).transpose(1, 2).flatten(2)
        return layer.out(y)

    assert_same(lambda: feed(layer, x, causal=causal), theirs, [x, *layer.parameters()], tolerance=2e-8)


SIDE = 5


def lines(heads: int, batch: int, rounds: int) -> Tensor:
    """(R, H·B, T) buckets: a square of 5 × 5 tokens cut into rows, then columns, then diagonals.

    A bucket is a chunk, and no two tokens are in the same bucket twice. Heads and sequences differ in
    the order of the tokens.
    """
    row, column = torch.arange(SIDE**2) // SIDE, torch.arange(SIDE**2) % SIDE
    found = [row] + [(column + slope * row) % SIDE for slope in range(rounds - 1)]
    shuffled = [
        torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(n)) for n in range(heads * batch)
    ]
    return torch.stack([torch.stack([b[order] for order in shuffled]) for b in found])


@both_directions
@pytest.mark.parametrize("n_hashes", [1, 2, 3, 6])
def test_equals_transformers(causal: bool, n_hashes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs reads whatever is in its chunks, of any bucket, and weighs a pair by how often it is met; its
    first chunk wraps around to the last of another round. So: buckets that are chunks, no chunk before,
    and no pair twice. Its scores lack 1/√D: we give it our queries over √D. Its key lengths are off by
    10⁻⁶, which is left out.
    """
    transformers = peer("transformers")
    package = peer("transformers.models.reformer.modeling_reformer")
    dims = dims_for(SIDE**2, 2)
    layer = make_layer(
        Reformer,
        ReformerConfig(n_hashes=n_hashes, chunk=SIDE, n_buckets=SIDE + 1, neighbourhood="chunk"),
        dims,
    )
    assert isinstance(layer, Reformer)
    buckets = lines(dims.heads, 2, n_hashes)
    monkeypatch.setattr(layer, "_buckets", lambda *_: buckets)
    config = transformers.ReformerConfig(
        **sizes(dims),
        attention_head_size=dims.head_dim,
        lsh_attn_chunk_length=SIDE,
        lsh_num_chunks_before=0,
        lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0,
        num_hashes=n_hashes,
        num_buckets=SIDE + 1,
        is_decoder=causal,
    )
    other = package.LSHSelfAttention(config).double()
    normalise = other._len_norm
    monkeypatch.setattr(other, "_len_norm", lambda x: normalise(x, epsilon=0.0))
    x = numbers(2, SIDE**2, dims.d_model)

    def theirs() -> Tensor:
        weights = {
            "query_key.weight": layer.qk.weight / dims.head_dim**0.5,
            "value.weight": layer.value.weight,
        }
        given = {"buckets": as_theirs(buckets, dims.heads, SIDE + 1)}
        return layer.out(functional_call(other, weights, (x,), given).hidden_states)

    assert_same(lambda: feed(layer, x, causal=causal), theirs, [x, *layer.parameters()])
