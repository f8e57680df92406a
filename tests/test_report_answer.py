"""The beginning of a report: which variant at which length, with ties, and all else folded behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_parts import part_of
from test_report import record, table, write

from bench.records import Record
from bench.report import build
from bench.report.data.faster import faster_than

MIB = 2**20


def cell(variant: str, seconds: float, peak: int, seq_len: int = 512, **other: Any) -> Record:
    timed = {"step_seconds_median": seconds, "step_seconds_samples": [seconds], "peak_bytes": peak * MIB}
    return record(variant, seq_len, **timed, variant_params={}, **other)


def swept(replicates: int = 3) -> list[Record]:
    """At 512 tokens dense is the fastest and needs as much memory as chunks; at 1,024 chunks are faster.
    Twins differ by ten per cent in turns, so that smaller differences are noise."""
    found = []
    for replicate in range(replicates):
        drift = 1.1 if replicate % 2 else 1.0
        for seq_len, times in ((512, (1.0, 2.0, 3.0)), (1024, (4.0, 1.0, 1.05))):
            for (variant, peak), seconds in zip(
                (("dense", 100), ("chunked", 101), ("performer", 200)), times, strict=True
            ):
                key = {"replicate": replicate, "cell_id": f"{variant}-{seq_len}-{replicate}"}
                found.append(cell(variant, seconds, peak * seq_len // 512, seq_len, **key))
                twin = {**key, "twin": 1, "cell_id": f"{variant}-{seq_len}-{replicate}-twin"}
                found.append(cell(variant, seconds * drift, peak * seq_len // 512, seq_len, **twin))
    return found


@pytest.mark.slow
def test_ties_are_named_together(tmp_path: Path) -> None:
    """Performer's five per cent at 1,024 tokens are within the noise, one per cent of memory is the same."""
    rows = table(part_of(tmp_path / "e", swept(), "answer").text, "### Cost of a training step")
    said = {row["length"]: (row["fastest"], row["least memory"]) for row in rows}
    assert said == {
        "512": ("dense (1.00×)", "dense (1.00×), chunked (1.01×)"),
        "1024": ("chunked (0.250×), performer (0.263×)", "dense (1.00×), chunked (1.01×)"),
    }


@pytest.mark.slow
def test_without_twins_no_noise_is_known(tmp_path: Path) -> None:
    found = [one for one in swept() if not one.twin]
    rows = table(part_of(tmp_path / "e", found, "answer").text, "### Cost of a training step")
    assert [row["fastest"] for row in rows] == ["dense (1.00×)", "chunked (0.250×), performer (0.263×)"]


def test_one_replicate_decides_nothing_however_large_the_difference(tmp_path: Path) -> None:
    found = [one for one in swept(replicates=1) if not one.twin]
    rows = table(part_of(tmp_path / "e", found, "answer").text, "### Cost of a training step")
    assert [row["fastest"] for row in rows] == ["not decided", "not decided"]


@pytest.mark.parametrize(
    ("disturbed", "said"),
    [
        ({"dense", "chunked", "performer"}, "only disturbed times"),
        ({"dense", "performer"}, "not decided: one undisturbed time"),
        ({"performer"}, "dense (1.00×); 1 left out§"),
    ],
)
def test_disturbed_times_name_no_winner(tmp_path: Path, disturbed: set[str], said: str) -> None:
    found = [one for one in swept() if one.seq_len == 512 and not one.twin]
    for one in found:
        one.contaminated = "busy" if one.variant in disturbed else None
    text = part_of(tmp_path / "e", found, "answer").text
    (row,) = table(text, "### Cost of a training step")
    assert row["fastest"] == said
    assert ("- § timed while something else ran" in text.partition("<details>")[0]) == ("§" in said)


def test_rows_have_every_key_in_which_they_differ(tmp_path: Path) -> None:
    found = [
        cell(variant, 1.0, 100, heads=heads, nll=2.0, cell_id=f"{variant}-{heads}")
        for variant in ("dense", "chunked")
        for heads in (1, 4)
    ]
    text = part_of(tmp_path / "e", found, "answer", "pareto").text
    for heading in ("### Cost of a training step", "### Trained models"):
        settings = [row["setting"] for row in table(text, heading)]
        assert ["1 head" in one for one in settings] == [True, False]
        assert ["4 heads" in one for one in settings] == [False, True]
    headings = [line for line in text.split("## Pareto fronts")[1].splitlines() if line.startswith("### ")]
    assert len(headings[:2]) == len(set(headings[:2]))
    assert "1 head" in headings[0]


def recalled(accuracies: dict[str, tuple[float, ...]]) -> list[Record]:
    """Models of a task with answers, which have no perplexity."""
    task = {"objective": "recall", "data": "mqar", "perplexity": None, "bits_per_byte": None}
    task |= {"word_perplexity": None, "guess_accuracy": 0.125, "unigram_perplexity": None}
    return [
        cell(variant, 1.0, 100, nll=1.0, accuracy=value, replicate=seed, cell_id=f"{variant}-{seed}", **task)
        for variant, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("accuracies", "best", "score"),
    [
        ({"dense": (0.99, 1.0, 0.98), "chunked": (0.2, 0.21, 0.19)}, "dense", "accuracy 99.0 ± 1.0 %"),
        ({"dense": (0.99, 1.0, 0.98), "chunked": (0.98, 0.97, 0.99)}, "not decided", "98.0 % to 99.0 %"),
        ({"dense": (0.99,), "chunked": (0.2,)}, "not decided", "accuracy 20.0 % to 99.0 %"),
    ],
)
def test_recall_is_answered_by_accuracy(
    tmp_path: Path, accuracies: dict[str, tuple[float, ...]], best: str, score: str
) -> None:
    (row,) = table(part_of(tmp_path / "e", recalled(accuracies), "answer").text, "### Trained models")
    assert row["best"] == best
    assert row["score"].endswith(score)
    assert row["guessing"] == "12.5 %"


def test_intervals_of_accuracies_end_at_100_percent(tmp_path: Path) -> None:
    found = recalled({"dense": (1.0, 1.0, 0.97), "chunked": (0.0, 0.01, 0.0)})
    for one in found:
        one.tokens_trained = 1000
    fronts = part_of(tmp_path / "e", found, "pareto").files()["pareto"]
    assert fronts["quality_high"].max() == 1.0
    assert fronts["quality_low"].min() == 0.0


def test_models_without_a_rank_say_why(tmp_path: Path) -> None:
    found = [
        cell(
            variant,
            1.0,
            100,
            nll=5.0,
            bits_per_byte=9.0,
            ngram_bits_per_byte=[5.0, 4.0, 3.0],
            cell_id=variant,
        )
        for variant in ("dense", "chunked")
    ]
    (row,) = table(part_of(tmp_path / "e", found, "answer").text, "### Trained models")
    assert row["best"] == "not ranked: undertrained"


def test_what_sees_the_future_is_no_answer(tmp_path: Path) -> None:
    found = swept() + [
        cell("reformer", 0.01, 1, n, replicate=r, cell_id=f"leak-{n}-{r}", leak_max_abs=0.5)
        for n in (512, 1024)
        for r in range(3)
    ]
    text = part_of(tmp_path / "e", found, "answer").text
    answer, _, rest = text.partition("<details>")
    assert "reformer" not in answer
    assert "reformer" in rest


@pytest.mark.slow
def test_everything_else_is_folded_behind_the_answer(tmp_path: Path) -> None:
    text = (build(write(tmp_path / "e", swept())) / "summary.md").read_text()
    answer, _, rest = text.partition("<details><summary>All tables and figures</summary>")
    assert answer.index("## Which one?") < answer.index("### Cost of a training step")
    assert "[![Cost over dense's]" in answer
    assert "[![Cost over dense's]" not in rest
    assert "## Cost\n" in rest
    assert len(answer.split()) < 2500
    assert answer.count("[![") <= 12
    assert text.count("<details>") == text.count("</details>")


@pytest.mark.slow
def test_one_variant_has_no_answer_and_nothing_is_folded(tmp_path: Path) -> None:
    text = part_of(tmp_path / "e", [one for one in swept() if one.variant == "dense"], "answer").text
    assert "Which one?" not in text
    assert "<details>" not in text
    assert "## Cost\n" in text


@pytest.mark.slow
def test_the_best_models_are_those_that_none_is_certainly_better_than(tmp_path: Path) -> None:
    """Two that are equal but for their seeds, and one that is worse by a nat."""
    found = []
    for replicate in range(5):
        shift = 0.01 * (-1) ** replicate
        for variant, nll in (("dense", 1.5 + shift), ("chunked", 1.5 - shift), ("performer", 2.5)):
            key = {"replicate": replicate, "cell_id": f"{variant}-{replicate}", "nll": nll}
            found.append(cell(variant, 1.0, 100, **key))
    (row,) = table(part_of(tmp_path / "e", found, "answer").text, "### Trained models")
    assert set(row["best"].split(", ")) == {"dense", "chunked"}
    assert row["score"].endswith(" ± 0.016 bits per byte")


def test_the_head_counts_second_measurements_and_uncommitted_changes(tmp_path: Path) -> None:
    found = [one for one in swept(replicates=2) if one.seq_len == 512]
    for one in found[:5]:
        one.git_dirty = True
    head = part_of(tmp_path / "e", found, "answer").text.partition("## ")[0]
    assert "- records: 12, of 2 replicates; 6 are second measurements of the same\n- statuses: 12 ok" in head
    assert "- uncommitted changes: in the code of 5 of 12 records" in head


@pytest.mark.parametrize("twins", [True, False])
def test_ranks_by_time_are_of_variants_that_are_told_apart(tmp_path: Path, twins: bool) -> None:
    """As the page has them; by the floor of twins, or by dense alone."""
    part = part_of(tmp_path / "e", [one for one in swept() if twins or not one.twin], "cost")
    cells = part.results.data["cost"]
    cells = cells[cells["seq_len"] == 1024]
    names = list(cells["label"])
    slower = [{names[place] for place in own} for own in faster_than(cells)]
    assert dict(zip(names, slower, strict=True)) == {
        "chunked": {"dense"},
        "performer": {"dense"},
        "dense": set(),
    }
