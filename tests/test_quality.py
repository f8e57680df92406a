"""What records say of quality, from real cells on a small corpus with documents of all lengths."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import bench

T = 256


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of twenty files, half of them scraps."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "texts").mkdir()
    words = np.random.default_rng(0).choice([b"the", b"quick", b"brown", b"fox", b"jumps\n"], size=40_000)
    for k in range(20):
        size = 30 if k < 10 else 2000
        (folder / "texts" / f"{k:02}.txt").write_bytes(b" ".join(words[k * 2000 : k * 2000 + size // 5]))
    return folder


def records(home: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """The records of a sweep by variant."""
    common = ["data=files", "data.path=texts", f"seq_len={T}", "depth=1", "measure.time_seconds=0"]
    done = bench("-m", *common, "measure.train_tokens=1000", *arguments, cwd=home)
    name = next(a.partition("=")[2] for a in arguments if a.startswith("name="))
    found = [json.loads(path.read_text()) for path in (home / "results" / name).glob("records/*.json")]
    assert found, done.stderr
    return {record["variant"]: record for record in found}


@pytest.fixture(scope="module")
def four(home: Path) -> dict[str, dict[str, Any]]:
    return records(
        home,
        "variant=dense,chunked,transformer_xl,linformer",
        "name=four",
        "measure.eval_stride=64",
        "measure.history_targets=8",
        "measure.place_period=64",
        "measure.attention_windows=2",
        "measure.prune_windows=2",
        "measure.reach=true",
        "measure.longer=4",
        "measure.longer_targets=128",
    )


@pytest.mark.slow
def test_every_variant_is_judged_on_the_same_targets(four: dict[str, dict[str, Any]]) -> None:
    assert {record["status"] for record in four.values()} == {"ok"}
    causal = [four[name] for name in ("dense", "chunked", "transformer_xl")]
    assert len({(r["tokens_evaluated"], r["unigram_perplexity"], r["data_sha256"]) for r in causal}) == 1
    assert four["linformer"]["tokens_evaluated"] == pytest.approx(
        0.15 * causal[0]["tokens_evaluated"], rel=0.3
    )


BASELINES = ("ngram_bits_per_byte", "ngram_train_bytes", "gzip_bits_per_byte", "xz_bits_per_byte")


def test_losses_by_block_are_of_the_same_text_for_every_causal_model(four: dict[str, dict[str, Any]]) -> None:
    causal = [record for record in four.values() if record["objective"] == "clm"]
    for record in causal:
        assert record["block_targets"] == causal[0]["block_targets"]
        assert record["block_documents"] == causal[0]["block_documents"]
        assert sum(record["block_targets"]) == record["tokens_evaluated"]
        for key in ("nll", "nll_reset"):
            blocks = record[f"{key}_by_block"]
            assert (blocks is None) == (record[key] is None)
            if blocks:
                mean = np.average(blocks, weights=record["block_targets"])
                assert record[key] == pytest.approx(mean, rel=2e-5)
    assert len(causal) > 1


def test_causal_models_have_one_set_of_baselines(home: Path, four: dict[str, dict[str, Any]]) -> None:
    """A table that knows only the frequencies of bytes has the loss of the unigram, but for its smoothing."""
    assert [four["linformer"][key] for key in BASELINES] == [None] * 4
    causal = [four[name] for name in ("dense", "chunked", "transformer_xl")]
    assert len({json.dumps([record[key] for key in BASELINES]) for record in causal}) == 1
    assert len(list((home / "results" / "four" / "baselines").glob("*.json"))) == 1
    orders = causal[0]["ngram_bits_per_byte"]
    assert orders[0] == pytest.approx(math.log2(causal[0]["unigram_perplexity"]), abs=0.2)
    assert orders[0] > orders[1] > orders[2] > 0  # five words at random: context helps
    assert T < causal[0]["ngram_train_bytes"] <= 4 * (T + 1)


def test_a_record_says_how_documents_were_read(four: dict[str, dict[str, Any]]) -> None:
    for name in ("dense", "chunked", "transformer_xl"):
        assert (four[name]["eval_stride"], four[name]["eval_min_context"]) == (64, 193)
    assert (four["linformer"]["eval_stride"], four["linformer"]["eval_min_context"]) == (None, None)
    policies = {name: record["state_policy"] for name, record in four.items()}
    assert policies == {"dense": "none", "chunked": "none", "linformer": "none", "transformer_xl": "carried"}


def test_what_was_asked_of_places_attention_and_reach_is_in_the_record(
    four: dict[str, dict[str, Any]],
) -> None:
    """Each where the variant can say it, and null where not."""
    for record in four.values():
        assert (record["place_period"], len(record["nll_by_place"])) == (64, 7)
    assert {name: record["reach"] for name, record in four.items()} == {
        "dense": T - 1,
        "chunked": T - 1,  # a chunk of 256
        "transformer_xl": T - 1,
        "linformer": T - 1,
    }
    said = {name for name, record in four.items() if record["attention_mass"]}
    assert said == {"dense", "chunked"}
    for name in said:
        assert four[name]["attention_mass"] > four[name]["attention_mass_uniform"]
        assert 0 < four[name]["cluster_mass_uniform"] < four[name]["cluster_mass_best"] <= 1
    for key in ("softmax_error", "softmax_error_initial"):
        assert {name for name, record in four.items() if record[key]} == {"linformer"}
    assert four["linformer"]["softmax_error"] != four["linformer"]["softmax_error_initial"]


def test_heads_are_removed_from_trained_models(four: dict[str, dict[str, Any]]) -> None:
    for name, record in four.items():
        if name == "transformer_xl":
            assert record["heads_kept_reason"].startswith("transformer_xl does not merge heads")
            assert record["heads_kept"] is record["nll_heads_kept"] is None
        else:
            assert record["heads_kept"] == [2, 1]
            assert record["nll_heads_kept"][0] == record["nll"] != record["nll_heads_kept"][1]
            assert record["heads_kept_reason"] is None
        assert record["visits_kept"] is record["visits_per_token"] is None


@pytest.mark.slow
def test_what_tokens_need_is_in_the_record(home: Path) -> None:
    """Training does not depend on the threshold; and layers that are left out in training are removed."""
    early = ("stack=early_exit", "depth=3", "measure.history_targets=0", "variant=dense")
    some, every = (
        records(home, *early, f"name=exit{n}", f"stack.threshold={threshold}")["dense"]
        for n, threshold in enumerate((0.05, 1))
    )
    assert 1 < some["visits_per_token"] < every["visits_per_token"] == 3
    assert some["flops_needed_forward"] < every["flops_needed_forward"]
    assert 3 * every["flops_needed_forward"] == pytest.approx(every["flops_algorithmic_step"], rel=0.01)
    assert some["nll"] != every["nll"]
    dropped = ("stack=layer_drop", "depth=4", "measure.prune_windows=1", "variant=reformer", "name=dropped")
    record = records(home, *dropped, "measure.history_targets=0")["reformer"]
    assert record["visits_kept"] == [4, 3, 2]
    assert record["nll_visits_kept"][0] == record["nll"]
    assert record["heads_kept_reason"].startswith("reformer does not merge heads")


@pytest.mark.slow
@pytest.mark.parametrize("searched", ["smallest", "largest"])
def test_one_run_serves_several_budgets_at_a_rate_that_was_searched(searched: str, home: Path) -> None:
    """Replicates share the search; figures of the largest budget are those of the record. A search with this
    budget makes the training of the first replicate."""
    trained = (
        f"name=budgets-{searched}",
        f"measure.search_budget={searched}",
        "variant=transformer_xl",
        "variant.segment=64",
        "replicate=0,1",
        "measure.train_tokens=8192",
        "measure.learning_rate=search",
        "measure.search_rates=[1e-3,1e-2]",
        "measure.schedule=wsd",
        "measure.train_budgets=3",
        "measure.carry_state=true",
        "measure.validations=2",
        "measure.history_targets=0",
    )
    records(home, *trained)
    folder = home / "results" / f"budgets-{searched}"
    both = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    assert [record["status"] for record in both] == ["ok"] * 2
    assert len({record["nll"] for record in both}) == 2
    assert len({json.dumps([r["learning_rates_tried"], r["learning_rate_nlls"]]) for r in both}) == 1
    for record in both:
        tried = record["learning_rates_tried"]
        assert record["learning_rate"] == tried[np.argmin(record["learning_rate_nlls"])]
        assert len(tried) >= 3, "of two rates the best is at an end"
        assert record["train_budgets"] == [2048, 4096, 8192]
        assert (record["tokens_trained"], record["schedule"]) == (8192, "wsd")
        assert record["nll_by_budget"][-1] == record["nll"]
        assert record["nll_by_budget"][0] > record["nll"]
        bits = [nll / math.log(2) for nll in record["nll_by_budget"]]
        assert record["bits_per_byte_by_budget"] == pytest.approx(bits)
        assert record["validation_tokens"] == [4096, 8192]
        assert len(set(record["validation_nll"])) == 2
        same = record["validation_nll"][-1] == min(record["learning_rate_nlls"])
        assert same == (searched == "largest" and record["replicate"] == 0)
        assert record["train_state"] == "carried"
        assert 8192 / 40_000 < record["epochs"] < 8192 / 15_000, "of about 20 kB"
    assert len(list((folder / "rates").glob("*.json"))) == len(both[0]["learning_rates_tried"])


@pytest.mark.slow
def test_what_was_not_asked_for_is_null(home: Path) -> None:
    record = records(home, "variant=dense", "name=plain", "measure.history_targets=0")["dense"]
    keys = ("place_period", "nll_by_place", "reach", "attention_mass", "cluster_mass", "softmax_error")
    assert [record[key] for key in keys] == [None] * len(keys)


@pytest.mark.slow
def test_a_plan_works_out_the_reach_where_it_is_asked(home: Path) -> None:
    plan = (
        "measure=plan",
        "measure.eval_tokens=1",
        "variant.segment=32",
        "variant.mem_len=32",
        "variant=transformer_xl",
    )
    assert records(home, *plan, "name=far", "measure.reach=true")["transformer_xl"]["reach"] == 63
    assert records(home, *plan, "name=near")["transformer_xl"]["reach"] is None


def test_trained_models_are_evaluated_on_longer_sequences_or_say_why_not(
    four: dict[str, dict[str, Any]],
) -> None:
    causal = [four[name] for name in ("dense", "chunked", "transformer_xl")]
    for record in causal:
        assert record["longer_lengths"] == [T, 2 * T, 4 * T]
        assert record["tokens_evaluated_longer"] == 128
        assert len(record["nll_longer_by_position"]) == 16
        assert record["nll_longer_by_position"][-1] == pytest.approx(record["nll_longer"][-1])
        assert record["longer_reason"] is None
        bits = [nll / math.log(2) for nll in record["nll_longer"]]
        assert record["bits_per_byte_longer"] == pytest.approx(bits)
    positions = ("rotary", "rotary, restarting in chunks of 256 tokens every 256", "relative")
    assert tuple(record["positions"] for record in causal) == positions
    chunked, memory = four["chunked"], four["transformer_xl"]
    assert chunked["nll_longer"] == pytest.approx([chunked["nll_longer"][0]] * 3), "a chunk of 256"
    assert memory["longer_memory_positions"] == [256, 512]
    assert memory["nll_longer_memory"][0] == memory["nll_longer"][-1]
    assert chunked["nll_longer_memory"] is None
    linformer = four["linformer"]
    assert linformer["longer_reason"] == "linformer has parameters for a fixed number of positions"
    assert linformer["nll_longer"] is None


def test_a_memory_model_has_both_figures(four: dict[str, dict[str, Any]]) -> None:
    assert {name for name, record in four.items() if record["nll_reset"] is not None} == {"transformer_xl"}
    memory = four["transformer_xl"]
    assert memory["nll"] != memory["nll_reset"] == pytest.approx(memory["nll"], abs=0.2)
    assert memory["perplexity"] == pytest.approx(math.exp(memory["nll"]))


def test_how_far_back_is_asked_of_causal_models(four: dict[str, dict[str, Any]]) -> None:
    keys = ("nll_by_history", "effective_context", "effective_context_low", "effective_context_high")
    assert [four["linformer"][key] for key in keys] == [None] * 4
    for name in ("dense", "chunked", "transformer_xl"):
        losses, middle, low, high = (four[name][key] for key in keys)
        assert len(losses) == 9
        assert 1 <= low <= middle <= high <= T
        assert four[name]["best_history"] == 2 ** losses.index(min(losses))
        assert four[name]["context_harm"] == pytest.approx(losses[-1] - min(losses))
        assert four[name]["context_harm_low"] <= four[name]["context_harm"]


@pytest.mark.slow
def test_weights_that_training_left_as_no_numbers_are_a_diverged_row(home: Path) -> None:
    """The one step's own loss is finite; what it leaves is not, and no perplexity stands in the record."""
    found = records(
        home, "variant=dense", "name=diverged", "measure.learning_rate=1e38", "measure.train_tokens=1"
    )
    assert found["dense"]["status"] == "diverged"
    assert "\n" not in found["dense"]["reason"]
    assert found["dense"]["perplexity"] is None
