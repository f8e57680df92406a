"""index.html in a real browser: drawn, sorted, filtered, asked, at two widths, light and dark, by keyboard.

Screenshots of every page go to tests/shots, for people to look at.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from many_records import ZOO
from pypdf import PdfReader
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_report import failed, record, sweep, write
from test_report_baselines import BITS, models
from test_report_decoding import cell as decoding_record
from test_report_page import HOSTILE, page_file, two_thousand_cells
from tiers import slow

import variants
from bench.records import Record
from bench.report.figures.selection import MOST

SHOTS = Path(__file__).parent / "shots"
CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
Pages = Callable[[str], Path]
"""The page of an experiment by name."""
LOADED = {"contaminated": "load 3.1"}
PATIENCE = 60
"""Seconds to wait for what happens at once on an idle machine."""
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and os.environ.get("CI") != "true",
    reason="no chromium or chromedriver here (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    assert CHROMIUM, "chromium is needed where CI=true"
    assert DRIVER, "chromedriver is needed where CI=true"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    # no sandbox: inside a container, as root, Chromium cannot make one
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


def decoding() -> list[Record]:
    """Dense's token takes longer with the context, and its state grows; chunked was disturbed at 8,192."""
    tokens = {"dense": lambda n: n * 1e-6, "longformer": lambda _: 0.002, "chunked": lambda _: 0.001}
    return [
        decoding_record(
            name,
            length,
            0,
            token(length),
            decode_peak_bytes=(2 * length if name == "dense" else 100) * 2**20,
            **(LOADED if (name, length) == ("chunked", 8192) else {}),
        )
        for name, token in tokens.items()
        for length in (512, 8192)
    ]


ZOO_NAMES = [name for own in ZOO.values() for name in own]


def fourteen() -> list[str]:
    """As many variants as one sees beside each other, with names of usual length."""
    return ["dense", *(f"variant_{number}" for number in range(13))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """The page of an experiment by name, built when it is first asked for."""
    home = tmp_path_factory.mktemp("pages")
    elsewhere = {"device": "cuda", "device_name": "Example GPU 80GB", "threads": 16}
    experiments = {
        "sweep": sweep,
        "single": lambda: [record()],
        "failed": lambda: [
            failed("oom", "needs 3.1 GiB, limit 2 GiB", variant=name, seq_len=length)
            for name in ("dense", "chunked")
            for length in (512, 1024)
        ],
        "mixed": lambda: [
            record(name, length, **where, cell_id=f"{name}-{length}-{len(where)}")
            for where in ({}, elsewhere)
            for name in ("dense", "chunked", *(["longformer"] if where else []))
            for length in (512, 1024)
        ],
        "many": lambda: [record(name, length) for name in fourteen() for length in (512, 1024)],
        "zoo": lambda: [record(name, length) for name in ZOO_NAMES for length in (512, 1024)],
        "generating": lambda: [record(name, 512) for name in ("dense", "longformer")] + decoding(),
        "only generating": decoding,
        "two tasks": lambda: [
            *models(),
            *(
                record(name, 1024, code_sha256="0" * 64, cell_id=f"other-{name}", **elsewhere)
                for name in BITS
            ),
        ],
        "disturbed": lambda: [
            record(name, length, **(LOADED if (name, length) == ("chunked", 1024) else {}))
            for name in ("dense", "chunked")
            for length in (512, 1024)
        ],
        "hostile": lambda: [
            record("dense"),
            record(HOSTILE, cell_id="name"),
            failed("error", HOSTILE, variant="chunked"),
            failed("oom", HOSTILE, variant="longformer", seq_len=1024),
        ],
    }

    def page(name: str) -> Path:
        folder = home / name
        if not folder.exists():
            page_file(write(folder, experiments[name]()))
        return folder / "index.html"

    return page


def show(browser: webdriver.Chrome, page: Path, *, width: int = 1280, dark: bool = False) -> None:
    """Open a page in a window of that width and colour scheme; nothing of it is in the logs yet."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    _prefer(browser, dark)
    browser.get(page.as_uri())


def _prefer(browser: webdriver.Chrome, dark: bool) -> None:
    """A colour scheme, and no motion: what is scrolled to is there at once."""
    features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    wanted = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})


def whole(browser: webdriver.Chrome, width: int) -> None:
    """Make the window as tall as the page, so that every chart is near the screen, and wait for them."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    drawn = """return [...document.querySelectorAll('#charts figure')].every(
        (figure) => !figure.checkVisibility() || figure.querySelector('svg.marks, .empty'))"""
    wait(browser, lambda: browser.execute_script(drawn))


def wait(browser: webdriver.Chrome, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())


def shoot(browser: webdriver.Chrome, name: str) -> None:
    SHOTS.mkdir(exist_ok=True)
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    (SHOTS / f"{name}.png").write_bytes(base64.b64decode(picture))


def complaints(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser: webdriver.Chrome) -> set[str]:
    """Every address that the browser asked for since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


def find(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def find_in(element: WebElement, selector: str) -> list[WebElement]:
    return element.find_elements(By.CSS_SELECTOR, selector)


def one(browser: webdriver.Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def column(browser: webdriver.Chrome, table: str, title: str) -> list[str]:
    """The texts of a column of a table, from the top."""
    script = """
        const table = document.querySelector(arguments[0]);
        const place = [...table.tHead.rows[0].cells].findIndex((c) => c.innerText.trim() === arguments[1]);
        return [...table.tBodies[0].rows].map((row) => row.cells[place].innerText.trim());
    """
    texts: list[str] = browser.execute_script(script, table, title)
    return texts


def wrong(browser: webdriver.Chrome, check: str) -> list[Any]:
    """What a function of page_checks.js finds."""
    found: list[Any] = browser.execute_script(f"{CHECKS}\nreturn {check}()")
    return found


@pytest.mark.parametrize(
    ("width", "dark"),
    [(1280, False), (390, False), (1280, True), *slow((390, True))],
    ids=["1280-light", "390-light", "1280-dark", "390-dark"],
)
@pytest.mark.parametrize("name", ["sweep", "single", "failed", "mixed", "hostile"])
def test_a_page_fits_its_window_and_asks_for_nothing(
    browser: webdriver.Chrome, pages: Pages, name: str, width: int, dark: bool
) -> None:
    """No scroll sideways, nothing over something else, no word on the console, no request but the page."""
    page = pages(name)
    show(browser, page, width=width, dark=dark)
    whole(browser, width)
    shoot(browser, f"{name}-{width}-{'dark' if dark else 'light'}")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert wrong(browser, "overlaps") == []
    assert wrong(browser, "crowded") == []
    assert complaints(browser) == []
    assert {url for url in requested(browser) if not url.startswith("data:")} == {page.as_uri()}
    assert browser.execute_script("return window.pwned") is None


def test_the_policy_stops_a_script_that_comes_in_later(browser: webdriver.Chrome, pages: Pages) -> None:
    show(browser, pages("single"))
    late = "const s = document.createElement('script'); s.text = 'window.pwned = 1'; document.body.append(s)"
    browser.execute_script(late)
    assert browser.execute_script("return window.pwned") is None
    assert any("Content Security Policy" in message for message in complaints(browser))


def test_a_click_on_a_column_sorts_by_its_figure(browser: webdriver.Chrome, pages: Pages) -> None:
    show(browser, pages("sweep"))
    seconds = {"ms": 1e-3, "s": 1.0}
    head = one(browser, "#table thead th:nth-child(4)")
    button = head.find_element(By.TAG_NAME, "button")
    assert button.text == "step time"
    assert head.get_attribute("aria-sort") == "none"
    for down in (False, True):
        button.click()
        assert head.get_attribute("aria-sort") == ("descending" if down else "ascending")
        shown = column(browser, "#table", "step time")
        assert len(shown) == 32
        assert shown[-2:] == ["–", "–"], "what was not taken comes last, whichever way"
        figures = [float(text.split()[0]) * seconds[text.split()[1]] for text in shown[:-2]]
        assert figures == sorted(figures, reverse=down)
    heads = [h.get_attribute("aria-sort") for h in find(browser, "#table thead th")]
    assert heads.count("descending") == 1
    assert heads.count("none") == len(heads) - 1


def test_filters_narrow_the_table_and_are_cleared(browser: webdriver.Chrome, pages: Pages) -> None:
    show(browser, pages("sweep"))
    one(browser, "#search").send_keys("LONG")
    assert set(column(browser, "#table", "variant")) == {"longformer"}
    Select(one(browser, "#filter-length")).select_by_visible_text("2,048")
    assert column(browser, "#table", "length") == ["2048", "2048"]
    assert one(browser, "#count").text == "2 of 32 cells"
    one(browser, "#search").clear()
    one(browser, "#search").send_keys("limit 2")
    assert one(browser, "#count").text == "0 of 32 cells"
    one(browser, "#filters button[type=reset]").click()
    wait(browser, lambda: one(browser, "#count").text == "32 of 32 cells")


def test_the_chooser_ranks_what_fits(browser: webdriver.Chrome, pages: Pages) -> None:
    """By hand: which fit follows from the peaks that the records have, the order from their figures."""
    show(browser, pages("sweep"))
    Select(one(browser, "#choose-length")).select_by_visible_text("4,096")
    Select(one(browser, "#choose-depth")).select_by_visible_text("4")
    finished = {"chunked", "longformer"}
    assert set(column(browser, "#by-speed", "variant")) == finished
    found = [r for r in sweep() if (r.seq_len, r.depth, r.status) == (4096, 4, "ok")]
    times = {name: [r.step_seconds_median or 0 for r in found if r.variant == name] for name in finished}
    fastest = {name: sorted(own)[1] for name, own in times.items()}
    assert column(browser, "#by-speed", "variant") == sorted(fastest, key=lambda name: fastest[name])
    best = {name: sum(r.perplexity or 0 for r in found if r.variant == name) for name in finished}
    assert column(browser, "#by-quality", "variant") == sorted(best, key=lambda name: best[name])
    assert "dense (oom)" in one(browser, "#left-out").text
    assert "overlapping (timeout)" in one(browser, "#left-out").text

    peaks = {name: max(r.peak_bytes or 0 for r in found if r.variant == name) for name in finished}
    Select(one(browser, "#budget-unit")).select_by_visible_text("MiB")
    one(browser, "#budget").send_keys(str(min(peaks.values()) / 2**20 - 1))
    assert not one(browser, "#answers").is_displayed()
    assert one(browser, "#chosen").text.startswith("0 of 4 recorded at length 4,096, depth 4 fit into")
    assert "Too large:" in one(browser, "#left-out").text
    one(browser, "#budget").clear()
    one(browser, "#budget").send_keys("100000")
    assert set(column(browser, "#by-speed", "variant")) == finished


@pytest.mark.parametrize("name", ["generating", "only generating"])
def test_the_chooser_advises_who_generates(browser: webdriver.Chrome, pages: Pages, name: str) -> None:
    """From the cells that measured decoding; a page with nothing else has no other chooser."""
    show(browser, pages(name))
    if name == "generating":
        assert one(browser, "#by-speed").is_displayed()
        assert not one(browser, "#by-token").is_displayed()
        Select(one(browser, "#purpose")).select_by_visible_text("generate")
        assert not one(browser, "#by-speed").is_displayed()
    else:
        assert not find(browser, "#purpose, #by-speed, #table")
    assert not one(browser, "#decoding-setting").is_displayed()
    lengths = Select(one(browser, "#choose-length"))
    assert [option.text for option in lengths.options] == ["512", "8,192"]
    kept = "512" if name == "generating" else "8,192"  # what was chosen; else the longest
    assert lengths.first_selected_option.text == kept
    lengths.select_by_visible_text("8,192")
    assert column(browser, "#by-token", "variant") == ["longformer", "dense", "chunked"], "disturbed last"
    assert [row.text for row in find(browser, "#by-token td.rank")] == ["1", "2", "–"]
    assert column(browser, "#by-token", "time a token") == ["2.00 ms", "8.19 ms", "1.00 ms§"]
    assert column(browser, "#by-token", "state") == ["4.00 KiB", "8.00 MiB", "4.00 KiB"]
    assert column(browser, "#by-rate", "variant") == ["longformer", "dense", "chunked"]
    assert column(browser, "#by-rate", "batch") == ["10", "10", "10"]
    lengths.select_by_visible_text("512")
    assert column(browser, "#by-token", "variant") == ["dense", "chunked", "longformer"]
    one(browser, "#budget").send_keys("0.5")
    assert column(browser, "#by-token", "variant") == ["chunked", "longformer"]
    assert one(browser, "#chosen").text == "2 of 3 decoded with a context of 512, depth 2 fit into 0.5 GiB."
    assert "dense (1.00 GiB)" in one(browser, "#left-out").text
    if name == "generating":
        Select(one(browser, "#purpose")).select_by_visible_text("train")
        assert set(column(browser, "#by-speed", "variant")) <= {"dense", "longformer"}


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("name", ["sweep", "two tasks"])
def test_the_first_screen_has_the_controls_and_three_rows_of_both_answers(
    browser: webdriver.Chrome, pages: Pages, name: str, width: int, height: int
) -> None:
    """Also below a choice of settings and a warning, as a report of several tasks has."""
    show(browser, pages(name), width=width)
    assert bool(find(browser, ".warning")) == bool(find(browser, "#setting")) == (name == "two tasks")
    best, fastest = (find(browser, f"#{table} tbody tr") for table in ("by-quality", "by-speed"))
    assert min(len(best), len(fastest)) >= 3
    for shown in (*find(browser, "#choice select, #choice input"), *best[:3], *fastest[:3]):
        assert shown.rect["y"] + shown.rect["height"] <= height


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["sweep", "two tasks", "hostile"])
def test_no_table_leaves_the_page(browser: webdriver.Chrome, pages: Pages, name: str, width: int) -> None:
    """A wide table scrolls inside its box; the page itself never scrolls sideways."""
    show(browser, pages(name), width=width)
    boxes = "return [...document.querySelectorAll('table')].map((t) => t.parentElement).filter("
    outside = "(box) => box.checkVisibility() && box.getBoundingClientRect().right > innerWidth)"
    assert browser.execute_script(f"{boxes}{outside}.map((box) => box.outerHTML.slice(0, 80))") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_fastest_table_needs_no_sideways_scroll_at_1280(browser: webdriver.Chrome, pages: Pages) -> None:
    show(browser, pages("sweep"), width=1280)
    room = "const room = document.querySelector('#by-speed').parentElement; "
    assert browser.execute_script(room + "return room.scrollWidth - room.clientWidth") <= 0


def test_on_a_phone_names_of_variants_are_on_one_line_and_the_fastest_table_fits(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    shown = {*variants.names(), *ZOO_NAMES} - {"hybrid"}  # whose name is that of its layers
    found = [record(name, length) for name in shown for length in (512, 1024)]
    twins = [record(name, 512, twin=1, cell_id=f"{name}-twin") for name in shown]  # so that there are ranks
    show(browser, page_file(write(tmp_path, found + twins)), width=390)
    Select(one(browser, "#choose-length")).select_by_visible_text("512")
    assert any("–" in rank and rank != "–" for rank in column(browser, "#by-speed", ""))
    names = find(browser, "#by-speed tbody th .name")
    assert {name.text for name in names} == shown
    assert len({name.rect["height"] for name in names}) == 1
    room = "const room = document.querySelector('#by-speed').parentElement; "
    assert browser.execute_script(room + "return room.scrollWidth - room.clientWidth") <= 0


@pytest.mark.parametrize("width", [1280, 390])
def test_long_names_leave_the_figures_their_room_and_stay_different(
    browser: webdriver.Chrome, tmp_path: Path, width: int
) -> None:
    """Of mixtures that differ in a number, in the table and beside the rows of a chart."""
    layers = [
        [f"longformer(window={size})", *["longformer(window=64)"] * 2, "dense"] for size in (16, 32, 64)
    ]
    found = [
        record("hybrid", variant_params={"layers": own}, cell_id=f"{place:016x}")
        for place, own in enumerate(layers)
    ]
    show(browser, page_file(write(tmp_path, [record("dense"), *found])), width=width)
    room = "const room = document.querySelector('#by-speed').parentElement; "
    assert browser.execute_script(room + "return room.scrollWidth - room.clientWidth") <= 0
    labels = find(browser, "#charts figure:first-of-type .role-axis-label text")
    names = [label.get_attribute("textContent") for label in labels]
    assert len({name for name in names if "longformer" in name}) == len(layers)
    assert not any("…" in name for name in names)


def test_the_chooser_says_where_quality_was_measured(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Where no model was trained at the length that is asked for, the nearest one speaks, and is named."""
    untrained = dict.fromkeys(("nll", "perplexity", "bits_per_byte", "word_perplexity"))
    planned = {**untrained, "step_seconds_median": None, "peak_bytes_source": "predicted"}
    found = [record(name, 512) for name in ("dense", "chunked")]
    found += [record(name, 2**16, **planned) for name in ("dense", "chunked")]
    show(browser, page_file(write(tmp_path, found)))
    assert "trained at length 512, depth 2 on 262 k tokens: the nearest" in one(browser, "#quality-note").text
    assert column(browser, "#by-quality", "variant") == ["dense", "chunked"]
    assert "peak memory predicted (ᵖ) in all" in one(browser, "#chosen").text
    assert "by executed FLOPs instead" in one(browser, "#speed-note").text
    assert all(text.startswith("not timed, ") for text in column(browser, "#by-speed", "step time"))


def test_the_chooser_shows_baselines_and_ranks_nothing_undertrained(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    show(browser, page_file(write(tmp_path, models())))
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#by-quality tbody tr')].map("
        "(row) => [...row.children].slice(0, 3).map((cell) => cell.textContent))"
    )
    assert [tuple(row) for row in rows] == [
        ("–", "5-gram table (baseline)", "2.400"),
        ("1", "dense", "2.500 ± 0.000"),
        ("–", "4-gram table (baseline)", "2.600"),
        ("2", "chunked", "2.900 ± 0.000"),
        ("–", "3-gram table (baseline)", "3.000"),
        ("–", "overlapping", "3.001 ± 0.000ᵘ"),
        ("–", "xz -9e (baseline)", "3.050"),
        ("–", "gzip -9 (baseline)", "3.200"),
        ("–", "longformer", "3.400 ± 0.000ᵘ"),
        ("–", "2-gram table (baseline)", "3.500"),
        ("–", "1-gram table (baseline)", "4.500"),
    ]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    chart = one(browser, "#pareto-figure")
    browser.execute_script("arguments[0].scrollIntoView()", chart)
    wait(browser, lambda: len(find(browser, "#pareto-figure svg.marks .mark-text text")) >= 3)
    texts = {text.text for text in find(browser, "#pareto-figure svg.marks .mark-text text")}
    assert texts >= {"3-gram table", "5-gram table", "gzip -9"}


def marks(browser: webdriver.Chrome, figure: int) -> list[WebElement]:
    return find(browser, f"#figures figure:nth-child({figure}) svg.marks .mark-symbol path")


def drawn_with(browser: webdriver.Chrome, figure: int, attribute: str) -> set[str]:
    """The values of an attribute of a chart's marks, read at once: a chart may be drawn anew meanwhile."""
    script = """return [...document.querySelectorAll(
        `#figures figure:nth-child(${arguments[0]}) svg.marks .mark-symbol path`)]
        .map((mark) => String(mark.getAttribute(arguments[1])))"""
    return set(browser.execute_script(script, figure, attribute))


def test_a_variant_that_is_ticked_off_leaves_every_chart(browser: webdriver.Chrome, pages: Pages) -> None:
    show(browser, pages("sweep"))
    whole(browser, 1280)
    before = [len(marks(browser, figure)) for figure in (1, 2, 3, 4)]
    # four variants at four lengths, and the x of the one that finished in part
    assert before == [17] * 4
    one(browser, "#legend input[value=dense]").click()
    wait(browser, lambda: [len(marks(browser, figure)) for figure in (1, 2, 3, 4)] == [13] * 4)
    one(browser, "#none").click()
    wait(browser, lambda: len(find(browser, "#figures .empty")) == 4)
    one(browser, "#all").click()
    wait(browser, lambda: [len(marks(browser, figure)) for figure in (1, 2, 3, 4)] == before)


def test_what_is_left_out_of_many_variants_is_one_click_away(browser: webdriver.Chrome, pages: Pages) -> None:
    """And so is a family."""
    show(browser, pages("zoo"))
    whole(browser, 1280)

    def drawn() -> int:
        return len(
            {text.text for text in find(browser, "#figures figure:first-child .mark-text.role-mark text")}
        )

    def ticked() -> int:
        return len(find(browser, "#legend input:checked"))

    every = len(ZOO_NAMES)
    wait(browser, lambda: drawn() == MOST)
    assert ticked() == MOST
    note = find(browser, "#figures .left")[0]
    assert note.text == f"{every - MOST} of {every} variants are not drawn."
    one(browser, "#all").click()
    wait(browser, lambda: drawn() == every)
    assert not note.is_displayed()
    heads = find(browser, "#legend .head")
    own = len(heads[0].find_elements(By.XPATH, "../label"))
    heads[0].click()
    wait(browser, lambda: drawn() == every - own)
    heads[0].click()
    wait(browser, lambda: drawn() == every)
    one(browser, "#best").click()
    wait(browser, lambda: drawn() == MOST)


def test_the_pointer_on_a_point_tells_its_figures_and_picks_out_its_variant(
    browser: webdriver.Chrome, pages: Pages
) -> None:
    show(browser, pages("sweep"))
    whole(browser, 1280)
    ActionChains(browser).move_to_element(marks(browser, 1)[0]).perform()
    tip = wait(browser, lambda: find(browser, "#vg-tooltip-element.visible"))[0]
    label, length = tip.text.split("\n")[:2]
    assert label.removeprefix("variant").strip() in {"dense", "chunked", "longformer", "overlapping"}
    assert length.removeprefix("length").strip() in {"512", "1024", "2048", "4096"}
    assert "time of a step" in tip.text

    def faded() -> set[str]:
        return drawn_with(browser, 2, "opacity")

    wait(browser, lambda: len(faded()) > 1)


@pytest.mark.parametrize("width", [390, 1280])
def test_each_line_of_a_chart_carries_its_name_without_overlap(
    browser: webdriver.Chrome, pages: Pages, width: int
) -> None:
    show(browser, pages("many"), width=width)
    whole(browser, width)
    script = """return [...document.querySelectorAll(
        '#figures figure:first-child svg.marks .mark-text.role-mark text')]
        .map((text) => [text.textContent, text.getBoundingClientRect().toJSON()])"""
    names = wait(browser, lambda: browser.execute_script(script))
    assert sorted(name for name, _ in names) == sorted(fourteen())
    boxes = sorted((box for _, box in names), key=lambda box: box["y"])
    assert all(below["y"] - above["y"] >= 12 for above, below in pairwise(boxes))
    assert all(box["x"] + box["width"] <= width for box in boxes)


def test_points_timed_beside_other_load_are_hollow_and_explained(
    browser: webdriver.Chrome, pages: Pages
) -> None:
    """Of two variants at two lengths, one of which was disturbed at one of them."""
    show(browser, pages("disturbed"))
    whole(browser, 1280)
    filled = """return [...document.querySelectorAll('#figures figure:nth-child(' + arguments[0] +
        ') svg.marks .mark-symbol path')].map((mark) => mark.getAttribute('fill'))"""
    notes = [note.text for note in find(browser, "#figures figure .hollow")]
    assert "timed while something else ran" in notes[0]
    assert browser.execute_script(filled, 1).count("#fff") == 1
    memory = 3
    assert notes[memory - 1] == ""
    assert "#fff" not in browser.execute_script(filled, memory)


def test_crosses_stand_where_cells_did_not_finish(browser: webdriver.Chrome, pages: Pages) -> None:
    show(browser, pages("sweep"))
    whole(browser, 1280)
    Select(one(browser, "#chart-depth")).select_by_visible_text("4")
    # depth 4 lost two cells whole and one in part
    crosses = "#figures figure:first-child .mark-symbol path[stroke-width='2']"
    wait(browser, lambda: len(find(browser, crosses)) == 3)
    ActionChains(browser).move_to_element(find(browser, crosses)[0]).perform()
    tip = wait(browser, lambda: find(browser, "#vg-tooltip-element.visible"))[0]
    assert any(status in tip.text for status in ("oom", "timeout", "error"))


def test_a_page_is_printed_with_its_charts(browser: webdriver.Chrome, pages: Pages) -> None:
    """Nobody scrolls before printing, so all charts must be drawn by themselves. In the PDF each has its
    title and, as text of the chart itself, that of its axis."""
    show(browser, pages("sweep"))
    charts = """return [...document.querySelectorAll('#charts figure')].filter((f) => f.checkVisibility())
        .map((f) => f.querySelector('svg.marks')?.getBoundingClientRect().height ?? 0)"""
    wait(browser, lambda: min(browser.execute_script(charts)) > 100)
    assert browser.execute_script("return scrollY") == 0
    SHOTS.mkdir(exist_ok=True)
    printed = base64.b64decode(browser.print_page())
    (SHOTS / "printed.pdf").write_bytes(printed)
    pages_of_it = [page.extract_text() for page in PdfReader(io.BytesIO(printed)).pages]
    text = " ".join(" ".join(pages_of_it).split())
    for figure in find(browser, "#charts figure"):
        if figure.is_displayed():
            title, axes = figure.get_attribute("data-title"), find_in(figure, "svg .role-axis-title text")
            assert str(title) in text
            assert axes
            assert all(axis.get_attribute("textContent") in text for axis in axes)


def test_another_colour_scheme_recolours_charts_that_are_drawn(
    browser: webdriver.Chrome, pages: Pages
) -> None:
    show(browser, pages("sweep"))
    whole(browser, 1280)

    def strokes() -> set[str]:
        return drawn_with(browser, 1, "stroke")

    assert "#000000" in strokes()
    _prefer(browser, dark=True)
    wait(browser, lambda: "#ffffff" in strokes() and "#000000" not in strokes())


def test_settings_are_kept_apart(browser: webdriver.Chrome, pages: Pages) -> None:
    """Two machines: the page shows the one with more cells first, and never both in one table."""
    show(browser, pages("mixed"))
    assert "GPU" in Select(one(browser, "#setting")).first_selected_option.text
    assert one(browser, "#count").text == "6 of 6 cells"
    other = next(o.text for o in Select(one(browser, "#setting")).options if "GPU" not in o.text)
    Select(one(browser, "#setting")).select_by_visible_text(other)
    assert one(browser, "#count").text == "4 of 4 cells"
    assert {label.text for label in find(browser, "#legend label")} == {"dense", "chunked"}
    assert "longformer" not in one(browser, "#by-speed").text


def focused(browser: webdriver.Chrome) -> WebElement:
    return browser.switch_to.active_element


def test_the_whole_page_works_by_keyboard(browser: webdriver.Chrome, pages: Pages) -> None:
    """Tab reaches every control in the order of the page, with its name and a visible focus."""
    show(browser, pages("sweep"))
    browser.execute_script("document.activeElement.blur()")
    reached: list[WebElement] = []
    for _ in range(60):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        element = focused(browser)
        if element.tag_name == "body" or element in reached:
            break
        reached.append(element)
        assert element.accessible_name, element.get_attribute("outerHTML")
        assert element.value_of_css_property("outline-style") != "none", element.get_attribute("outerHTML")
    assert reached[0].accessible_name == "Skip to the content"
    identifiers = [element.get_attribute("id") for element in reached]
    controls = ["choose-length", "choose-depth", "budget", "chart-depth", "all", "search", "filter-length"]
    assert [name for name in identifiers if name in controls] == controls
    names = [element.accessible_name for element in reached]
    assert {"step time", "variant", "Cells", "What did not finish"} <= set(names)

    next(e for e in reached if e.accessible_name == "peak memory").send_keys(Keys.ENTER)
    assert one(browser, "#table th[aria-sort=ascending]").text == "peak memory"
    box = next(e for e in reached if e.accessible_name == "chunked")
    box.send_keys(Keys.SPACE)
    assert not box.is_selected()
    one(browser, "#choose-length").send_keys("512")
    assert "length 512" in one(browser, "#chosen").text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_its_background(
    browser: webdriver.Chrome, pages: Pages, dark: bool
) -> None:
    show(browser, pages("mixed"), dark=dark)
    assert wrong(browser, "faint") == []


def test_a_page_of_two_thousand_cells_is_of_use(
    browser: webdriver.Chrome, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """What it weighs and how soon it is of use is reported; how soon depends on what else runs."""
    page = tmp_path / "index.html"
    page.write_text(two_thousand_cells(tmp_path), encoding="utf-8")
    show(browser, page)
    assert one(browser, "#count").text == "2,000 of 2,000 cells, the first 100 shown"
    assert len(find(browser, "#table tbody tr")) == 100
    timing = "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd / 1000"
    record_property("usable_seconds", browser.execute_script(timing))
    record_property("bytes", page.stat().st_size)
    one(browser, "#more").click()
    assert browser.execute_script("return document.querySelectorAll('#table tbody tr').length") == 2000
    assert complaints(browser) == []
