"""The gallery shows what the modules read: their gradients are what their rules say, pair by pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from test_contract import small_knobs
from test_registry import distribution

import variants
from bench.tools.gallery import __main__ as command
from bench.tools.gallery import draw, reads
from bench.tools.gallery.reads import Panel, Picture, Sizes
from bench.tools.gallery.sheet import sheet
from variants.attention.longformer import Longformer
from variants.base import Dims, MakesChoices, segment_mask
from variants.input_schedule import Chunks
from variants.ops.patterns import masks

SIZES = Sizes.configured(seq_len=24, layers=2, inputs=3)


@pytest.fixture(scope="module")
def gallery() -> list[Picture]:
    """All pictures of configs/gallery.yaml, small."""
    return list(reads.pictures(SIZES))


def panels(picture: Picture) -> list[Panel]:
    return [panel for direction in picture.directions for panel in direction.panels]


def test_every_variant_has_a_picture_and_every_direction_panels_or_a_reason(gallery: list[Picture]) -> None:
    assert {picture.variant for picture in gallery} == set(variants.mixers())
    for picture in gallery:
        caps = variants.load(picture.variant).info.caps
        assert [direction.causal for direction in picture.directions] == [True, False]
        for direction in picture.directions:
            assert bool(direction.panels) != bool(direction.reason)
            if not (caps.causal if direction.causal else caps.bidirectional):
                assert direction.reason
        assert panels(picture), "some direction is drawn"


def test_every_knob_in_the_config_is_one_of_its_variant_s() -> None:
    assert set(SIZES.knobs) <= set(variants.mixers())
    for name, sets in SIZES.knobs.items():
        for knobs in sets:
            assert variants.load(name).Config.of(knobs).as_dict().items() >= knobs.items()


def test_gradients_are_the_rule_through_one_layer_and_through_two(gallery: list[Picture]) -> None:
    ruled = [panel for picture in gallery for panel in panels(picture) if panel.rule is not None]
    assert {panel.layers for panel in ruled} == {1, 2}
    assert not [picture.variant for picture in gallery if draw.disagrees(picture)]
    for panel in ruled:
        assert set(panel.share.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(panel.share > 0, panel.rule)


def test_two_layers_read_the_boolean_product_of_their_rules(gallery: list[Picture]) -> None:
    """Chunks that overlap are the exception: the windows of the plan do not chain."""
    seen = 0
    for picture in gallery:
        variant = variants.load(picture.variant)
        for direction in picture.directions:
            if not direction.panels or (rule := direction.panels[0].rule) is None:
                continue
            config = variant.Config.of(picture.knobs)
            dims = Dims(seq_len=SIZES.seq_len, d_model=SIZES.d_model, heads=SIZES.heads)
            upper = variants.load_mixer(picture.variant)(config, dims, layer=1)
            second = segment_mask(
                upper, variant.input_schedule(config), SIZES.seq_len, causal=direction.causal
            )
            assert second is not None
            product = (second.double() @ rule.double()) > 0
            two = direction.panels[1].share > 0
            if isinstance(variant.input_schedule(config), Chunks):
                assert not (two & ~product).any()
            else:
                assert torch.equal(two, product), picture.variant
                seen += int((two & ~rule).any())
    assert seen >= 6, "a second layer adds nothing to most: the knobs are too large"


SMALL = [
    pytest.param(name, knobs, id=f"{name}-{place}")
    for name in variants.mixers()
    for place, knobs in enumerate(small_knobs(name))
]


@pytest.mark.parametrize(("name", "knobs"), SMALL)
def test_other_knobs_agree_too(name: str, knobs: dict[str, Any]) -> None:
    """Where layers differ, heads differ, and lengths are a multiple of nothing."""
    picture = reads.picture(dataclasses.replace(SIZES, seq_len=37, inputs=1), name, knobs)
    assert panels(picture)
    assert not draw.disagrees(picture)


def test_content_decides_within_the_past(gallery: list[Picture]) -> None:
    undecided = [picture for picture in gallery if any(panel.rule is None for panel in panels(picture))]
    assert {picture.variant for picture in undecided} >= {"reformer", "routing"}
    for picture in undecided:
        assert picture.inputs == SIZES.inputs
        for direction in picture.directions:
            for panel in direction.panels:
                # A token with a single key gives it all weight, whatever the token itself holds; one that
                # reads nothing has a constant.
                blind, reads_some = ~panel.example.diagonal(), panel.share.gt(0).any(-1)
                assert panel.example[blind].sum(-1).le(1).all(), "any other token knows what it holds"
                assert panel.share.diagonal()[reads_some].gt(0).all()
                assert (panel.example <= (panel.share > 0)).all()
                if direction.causal:
                    assert not panel.share.triu(1).any()
            if issubclass(variants.load(picture.variant), MakesChoices):
                # clusters of queries and compressed keys read everything, coarsely; clusters may be those of
                # the upper layer
                shares = [panel.share for panel in direction.panels]
                whole = [
                    torch.ones_like(share).tril(0 if direction.causal else len(share)) for share in shares
                ]
                some = [
                    ((share > 0) & (share < 1)).any() or torch.equal(share, everything)
                    for share, everything in zip(shares, whole, strict=True)
                ]
                assert any(some) or not some, f"{picture.variant}: inputs differ in what is read"


def test_a_rule_that_lies_is_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lies(self: Longformer, seq_len: int, *, causal: bool) -> torch.Tensor:
        shifted = masks.Window(3)
        return masks.matrix(lambda h, i, j: shifted(h, i, j + 1), seq_len)

    monkeypatch.setattr(Longformer, "attention_mask", lies)
    picture = reads.picture(SIZES, "longformer", {"window": [3]})
    one = picture.directions[1].panels[
        0
    ]  # it reads from 2 back to 2 ahead; the lie says from 3 back to 1 ahead
    behind = masks.matrix(lambda _, i, j: i - j == 3, SIZES.seq_len).numpy()
    assert np.array_equal(draw.unread(one), behind)
    ahead = masks.matrix(lambda _, i, j: j - i == 2, SIZES.seq_len).numpy()
    assert np.array_equal(draw.forbidden(one), ahead)
    assert draw.disagrees(picture)
    counts = {label.split(":")[0]: label.split(": ")[1] for label in legend(draw.figure(picture, SIZES))}
    assert int(counts["mask allows,\ngradient zero"]) == sum(draw.unread(p).sum() for p in panels(picture))
    assert int(counts["mask forbids,\ngradient not zero"]) == sum(
        draw.forbidden(p).sum() for p in panels(picture)
    )


def legend(figure: Figure) -> list[str]:
    """Labels that count something."""
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts() if ": " in text.get_text()]


def test_shades_are_the_fewest_layers_and_the_share() -> None:
    first = torch.eye(4, dtype=torch.bool)
    second = first | first.roll(1, 0)
    steps = [Panel(n, rule.double(), rule, rule) for n, rule in ((1, first), (2, second))]
    shade = draw.deep(steps, "#0000ff")
    assert (shade[first.numpy()] == [0, 0, 1]).all()
    assert (shade[~second.numpy()] == 1).all()
    lighter = shade[(second & ~first).numpy()]
    assert ((lighter[:, :2] > 0.5) & (lighter[:, :2] < 1)).all()
    share = Panel(2, torch.full((4, 4), 0.25).double(), first, None)
    assert np.allclose(draw.deep([share, share], "#000000"), 0.75)


def written(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text")))


def test_figures_say_what_they_show(gallery: list[Picture]) -> None:
    for picture in (p for p in gallery if p.variant in {"dense", "longformer", "linformer", "reformer"}):
        figure = draw.figure(picture, SIZES)
        drawn = [axis for axis in figure.axes if axis.get_visible() and axis.images]
        assert len(drawn) == 3 * sum(bool(direction.panels) for direction in picture.directions)
        assert {axis.get_xlabel() for axis in drawn} == {"key position"}
        assert "query position" in {axis.get_ylabel() for axis in drawn}
        text = written(figure)
        assert ("averaged over 3 random inputs" in text) == (picture.inputs > 1)
        assert ("mask allows" in text) == ("the mask" in text) == (picture.inputs == 1)
        assert all(
            direction.reason.split(":")[0] in text for direction in picture.directions if direction.reason
        )


def test_the_sheet_has_every_picture(gallery: list[Picture]) -> None:
    figure = sheet(gallery, SIZES)
    squares = sum(2 * bool(direction.panels) for picture in gallery for direction in picture.directions)
    assert sum(bool(axis.images) for axis in figure.axes) == squares
    names = [text.get_text().rstrip("*") for text in figure.texts]
    assert all(names.count(picture.variant) >= 1 for picture in gallery)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sizes, "configured", lambda: dataclasses.replace(SIZES, seq_len=16, inputs=2))


@pytest.mark.usefixtures("small")
def test_the_command_writes_pictures_and_the_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path), "--only", "longformer", "routing"]) == 0
    pictures = {"longformer", "longformer-2", "longformer-3", "routing", "sheet"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{p}.{kind}" for p in pictures for kind in ("png", "svg")
    }
    for name in pictures:
        assert imread(tmp_path / f"{name}.png").std() > 0.01, "something is drawn"
    assert "sheet.png" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_disagreement_is_the_command_s_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("variants.attention.dense.Dense.mask", lambda self, n, causal: masks.all_keys)
    assert command.main(["--out", str(tmp_path), "--only", "dense"]) == 1
    assert "disagree in dense" in capsys.readouterr().err
    assert (tmp_path / "dense.png").exists()


def test_an_unknown_variant_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--only", "longfromer"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean longformer?" in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("small")
def test_variants_of_others_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = distribution(tmp_path / "site", {"lagged": "lagged_attention.lagged:Lagged"})
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(variants, "_entry_points", variants._entry_points.__wrapped__)
    assert "lagged" in variants.mixers()
    (picture,) = reads.pictures(Sizes.configured(), ["lagged"])
    causal, bidirectional = picture.directions
    assert bidirectional.reason == "has no bidirectional form"
    assert torch.equal(causal.panels[0].share > 0, masks.matrix(lambda _, i, j: (i == j) | (i - j == 1), 16))
    assert causal.panels[1].share.sum() == 16 + 15 + 14
    assert command.main(["--out", str(tmp_path / "out"), "--only", "lagged"]) == 0
    assert (tmp_path / "out" / "lagged.svg").exists()


@pytest.mark.parametrize("name", variants.mixers())
def test_a_variant_that_is_not_listed_is_drawn_with_smaller_defaults(name: str) -> None:
    """In proportion to the length, as far as its knobs allow; counts below the scale stay."""
    config = variants.load(name).Config
    usual, small = config(), config.of(reads.scaled(name, 16))
    for key, value in small.as_dict().items():
        before = getattr(usual, key)
        entries = zip(before, value, strict=True) if isinstance(before, tuple) else [(before, value)]
        for old, new in entries:
            assert new == old or new == old // 16
    assert reads.scaled(name, 10**9) == {}


def test_an_unlisted_variant_has_a_picture() -> None:
    sizes = dataclasses.replace(SIZES, knobs={})
    (drawn,) = reads.pictures(sizes, ["longformer"])
    assert drawn.knobs == {"window": [16]}
    assert not draw.disagrees(drawn)
