"""What every depth schedule promises that changes the number of tokens. It is found by its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

import variants
from bench import CONFIGS
from bench.config.parse import parse
from bench.config.spec import CellSpec, DataSpec, MeasureSpec, ModelSizes, SlotChoice
from bench.evaluate.receptive_field import reach
from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.model.decode import no_decoding
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, depth_schedule, feed_forward
from bench.scenarios.support import Unsupported, check_supported
from variants.base import Context, Dims, Workload
from variants.base.lengths import ChangesLength
from variants.slots import STACK

VOCABULARY, DEPTH = 11, 4
NAMES = [name for name in STACK.names() if issubclass(STACK.load(name), ChangesLength)]
KNOBS: dict[str, dict[str, Any]] = {
    "funnel": {"stride": 3},
    "hierarchical": {"segment": 5},
    "perceiver_ar": {"latents": 10},
    "perceiver_io": {"latents": 5},
    "token_learner": {"tokens": 4, "bottleneck": 6},
}
"""Small enough to change the length of 24 tokens."""

every_name = pytest.mark.parametrize("name", NAMES)


def model_of(
    name: str, tokens: int, variant: str = "dense", knobs: Mapping[str, Any] | None = None, **own: Any
) -> LanguageModel:
    """float64, with weights so large that what a token holds arrives wherever it can go."""
    loaded = variants.load(variant)
    spec = ModelSpec.of(
        loaded,
        loaded.Config(**own),
        feed_forward=feed_forward(mult=2),
        depth=depth_schedule(name, **{**KNOBS.get(name, {}), **(knobs or {})}),
    )
    sizes: dict[str, Any] = {"dropout": 0.0, "vocabulary": VOCABULARY, "activations": "keep"}
    torch.manual_seed(0)
    dims = Dims(seq_len=tokens, d_model=16, heads=2)
    model = LanguageModel(spec, dims, depth=DEPTH, **sizes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def objectives(model: LanguageModel) -> list[bool]:
    return [causal for causal in (True, False) if model.spec.no_form(causal=causal) is None]


def hidden(tokens: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 16, dtype=torch.float64, generator=source)


def run(model: LanguageModel, x: Tensor, *, causal: bool) -> Tensor:
    y: Tensor = model.run_visits(x, None, Context(causal=causal)).y
    return y


def work_of(tokens: int, *, causal: bool) -> Workload:
    return Workload(batch_size=2, seq_len=tokens, d_model=16, heads=2, causal=causal)


@contextmanager
def seen_windows(model: LanguageModel, batch: int) -> Iterator[list[list[tuple[int, int]]]]:
    """(length, number) of the windows of each visit inside the context, of a sequence in a batch."""
    seen: list[list[tuple[int, int]]] = [[] for _ in model.blocks]

    def note(place: int, x: Tensor) -> None:
        seen[place].append((x.shape[1], x.shape[0] // batch))

    hooks = [
        block.register_forward_hook(lambda _, args, __, place=place: note(place, args[0]))
        for place, block in enumerate(model.blocks)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@every_name
@pytest.mark.parametrize("tokens", [1, 2, 13, 24])
def test_visits_process_what_the_schedule_says(name: str, tokens: int) -> None:
    """Also in a model that was built for longer sequences."""
    model = model_of(name, 24)
    for causal in objectives(model):
        with seen_windows(model, batch=2) as seen:
            y = run(model, hidden(tokens), causal=causal)
        assert seen == model.depth_schedule.windows(tokens)
        longest = [max(length for length, _ in windows) for windows in seen]
        assert longest == [*model.depth_schedule.lengths(tokens)]
        assert y.isfinite().all()


@every_name
def test_the_length_is_changed(name: str) -> None:
    assert {*model_of(name, 24).depth_schedule.lengths(24)} != {24}


@every_name
@pytest.mark.parametrize("tokens", [2, 7, 24])
def test_no_output_reads_a_later_token(name: str, tokens: int) -> None:
    model = model_of(name, tokens)
    if True not in objectives(model):
        with pytest.raises(ValueError, match=f"^stack={name}: "):
            run(model, hidden(tokens), causal=True)
        return
    x = hidden(tokens)
    before = run(model, x, causal=True)
    skipped = tokens - before.shape[1]
    for cut in range(max(1, skipped), tokens):
        changed = torch.cat([x[:, :cut], hidden(tokens, 1)[:, cut:]], dim=1)
        after = run(model, changed, causal=True)
        assert torch.equal(after[:, : cut - skipped], before[:, : cut - skipped])
        assert not torch.equal(after[:, cut - skipped], before[:, cut - skipped])


@every_name
def test_sequences_of_a_batch_are_independent(name: str) -> None:
    model = model_of(name, 13)
    for causal in objectives(model):
        x = hidden(13)
        alone = torch.cat([run(model, one, causal=causal) for one in x.split(1)])
        torch.testing.assert_close(run(model, x, causal=causal), alone)


@every_name
@pytest.mark.parametrize("tokens", [1, 2, 7, 13, 24])
def test_flops_are_those_of_the_formula(name: str, tokens: int) -> None:
    """Or more, for a reason that the path states."""
    model = model_of(name, tokens)
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    for causal in objectives(model):
        with CountFlops() as counter, torch.no_grad():
            model(ids, causal=causal)
        cost = model.cost(work_of(tokens, causal=causal))
        if model.path.flop_overhead_reason is None:
            assert counter.total == cost.total
        else:
            assert 1 <= (counter.total - cost.tokenwise) / cost.mixing <= gates.COST_LIMIT
            assert f"stack={name}: {model.path.flop_overhead_reason}" == model.flop_overhead_reason


@every_name
def test_what_cannot_be_is_said(name: str) -> None:
    """Decoding, a figure of reach, a reversible network, memories and impossible lengths."""
    model = model_of(name, 24)
    assert (no_decoding(model) or "").startswith(f"stack={name} ") or True not in objectives(model)
    assert all(reach(model, 24, causal=causal) is None for causal in objectives(model))
    reason = model.spec.conflict(DEPTH, "reversible")
    assert reason is not None
    assert reason.startswith(f"activations=reversible with stack={name}: ")
    sizes = Dims(seq_len=24, d_model=16, heads=2)

    def wrong(variant: str, **knobs: Any) -> str | None:
        loaded = variants.load(variant)
        spec = ModelSpec.of(loaded, loaded.Config(**knobs), depth=model.spec.depth)
        return spec.wrong_lengths(DEPTH, sizes, causal=variant == "transformer_xl")

    assert wrong("dense") is None
    if model.depth_schedule.outputs(24) < 24:
        few = f"stack={name} has outputs for the last tokens of a sequence, and the variant divides sequences"
        assert wrong("transformer_xl") == few
        return
    if reason := wrong("longformer"):  # a path may need more of a layer than its outputs
        assert reason.startswith(f"longformer: stack={name} ")
        return
    shortest = min(model.depth_schedule.lengths(24))
    assert wrong("linformer", k=shortest) is None
    too_few = f"linformer for the {shortest} tokens of stack={name}: k={shortest + 1}: "
    assert str(wrong("linformer", k=shortest + 1)).startswith(too_few)
    carries = f"transformer_xl: carries state from each segment to the next, and stack={name} changes "
    assert str(wrong("transformer_xl")).startswith(carries)


def cell(name: str, seq_len: int = 50, variant: str = "dense", **changed: Any) -> CellSpec:
    settings: dict[str, Any] = {
        "variant_params": variants.load(variant).Config().as_dict(),
        "seq_len": seq_len,
        "depth": 3,
        "batch_size": 1,
        "replicate": 0,
        "objective": "clm",
        "device": "cpu",
        "dtype": "float32",
        "activations": "keep",
        "model": ModelSizes(d_model=16, heads=2),
        "data": DataSpec(),
        "measure": MeasureSpec(),
        "stack": SlotChoice(name=name, params=STACK.load(name).Config.of(KNOBS.get(name, {})).as_dict()),
    }
    return CellSpec(variant=variant, **{**settings, **changed})


@every_name
@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_gates_pass_or_the_record_says_why_not(name: str, objective: str, tmp_path: File) -> None:
    spec = cell(name, objective=objective, activations="checkpoint")
    if reason := spec.model_spec().no_form(causal=spec.causal):
        with pytest.raises(Unsupported) as raised:
            check_supported(spec)
        assert str(raised.value) == reason
        return
    check_supported(spec)
    figures = gates.check(spec, tmp_path, "code")
    assert figures.recompute_max_abs is not None
    assert (figures.leak_max_abs is None) == (objective == "mlm")


@every_name
def test_the_objective_is_one_that_the_schedule_has(name: str) -> None:
    """`objective=auto`, and the objective of a task."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        spec = parse(compose("config", overrides=["device=cpu", f"stack={name}"])).spec
    assert spec.objective == ("clm" if spec.model_spec().no_form(causal=True) is None else "mlm")
    assert spec.model_spec().no_form(causal=spec.causal) is None
    listops = cell(name, data=DataSpec(name="listops"), objective="listops")
    assert listops.causal == (listops.model_spec().no_form(causal=True) is None)
