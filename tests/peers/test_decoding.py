"""Decoding beside transformers' Llama with its static cache: the same weights give the same tokens.

Norms and feed-forward layers are those of the model here, because Llama has others; attention, rotary
positions and cache are theirs. With `-s` the times of a token are printed, by alternating runs.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.model.decode import Decoder
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec
from peers import peer
from variants.attention.dense import Dense, DenseConfig
from variants.base import Dims
from variants.ops.projections import ROTARY_BASE

pytestmark = pytest.mark.peers
VOCABULARY, DEPTH, WIDTH, HEADS = 257, 4, 256, 4


class _Feed(nn.Module):
    """A feed-forward layer whose result is the outputs alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x).y
        return y


def ours(seq_len: int, kv_heads: int = HEADS) -> LanguageModel:
    torch.manual_seed(0)
    spec = ModelSpec.of(Dense, DenseConfig())
    dims = Dims(seq_len=seq_len, d_model=WIDTH, heads=HEADS, kv_heads=kv_heads)
    model = LanguageModel(spec, dims, depth=DEPTH, dropout=0.0, vocabulary=VOCABULARY, activations="keep")
    return model.eval()


def theirs(model: LanguageModel, seq_len: int) -> Any:
    """Llama with the weights of the model."""
    transformers = peer("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=model.layers[0].dims.key_heads,
        max_position_embeddings=seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.model.embed_tokens.weight = model.embedding.weight
    llama.model.norm, llama.lm_head.weight = model.norm, model.head.weight
    for block, layer in zip(model.visits, llama.model.layers, strict=True):
        layer.input_layernorm, layer.post_attention_layernorm = block.mixer_norm, block.feed_forward_norm
        layer.mlp = _Feed(block.feed_forward)
        dims = block.mixer.dims
        sizes = [dims.inner_dim, dims.key_dim, dims.key_dim]
        qkv = block.mixer.get_parameter("projections.qkv.weight").split(sizes)
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
            getattr(layer.self_attn, name).weight = nn.Parameter(weight)
        layer.self_attn.o_proj.weight = block.mixer.get_parameter("projections.out.weight")
    return llama


@torch.no_grad()
def our_tokens(
    model: LanguageModel, prompt: Tensor, count: int, max_len: int
) -> tuple[list[int], list[float]]:
    decoder = Decoder(model, 1, max_len)
    logits = decoder.read(prompt)
    chosen, seconds = [], []
    for _ in range(count):
        chosen.append(int(logits.argmax()))
        begun = time.perf_counter()
        logits = decoder.read(torch.tensor([[chosen[-1]]]))
        seconds.append(time.perf_counter() - begun)
    return chosen, seconds


@torch.no_grad()
def their_tokens(llama: Any, prompt: Tensor, count: int, max_len: int) -> tuple[list[int], list[float]]:
    cache = peer("transformers").StaticCache(config=llama.config, max_cache_len=max_len)
    logits = llama(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    chosen, seconds = [], []
    for _ in range(count):
        chosen.append(int(logits[0, -1].argmax()))
        position = prompt.shape[1] + len(chosen) - 1
        begun = time.perf_counter()
        logits = llama(
            torch.tensor([[chosen[-1]]]),
            past_key_values=cache,
            use_cache=True,
            cache_position=torch.tensor([position]),
            position_ids=torch.tensor([[position]]),
        ).logits
        seconds.append(time.perf_counter() - begun)
    return chosen, seconds


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
@pytest.mark.parametrize(("prompt", "count"), [(1, 30), (100, 60), (2000, 40)])
def test_greedy_tokens_equal_those_of_llama(prompt: int, count: int, kv_heads: int) -> None:
    max_len = prompt + count
    model = ours(max_len, kv_heads)
    llama = theirs(model, max_len)
    tokens = torch.randint(VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(1))
    pairs = [
        (our_tokens(model, tokens, count, max_len), their_tokens(llama, tokens, count, max_len))
        for _ in range(3)
    ]
    assert all(own[0] == other[0] for own, other in pairs)
    own, other = (statistics.median(each for pair in pairs for each in pair[side][1]) for side in (0, 1))
    setting, times = f"prompt {prompt}, {kv_heads} heads of keys", f"Llama {1e3 * other:.2f} ms"
    print(f"\n{setting}: {1e3 * own:.2f} ms a token, {times}: {own / other:.2f}×")
