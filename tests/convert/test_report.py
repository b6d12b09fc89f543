"""The report in a real browser: it shows the proof, and needs no other file."""

import dataclasses
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pytest
import reference
from playwright.sync_api import Browser, Page, expect, sync_playwright
from proof import Proof, Stage
from report import render

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)

NAMES = [
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
    *("inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b", "avgpool", "fc", "aux1", "aux2"),
]
LOGITS = np.zeros((2, 1000), np.float32)
LOGITS[0, 17], LOGITS[1, 985] = 8, 9  # jay and daisy

FACTS = {
    "source": "<script>document.title = 'run'</script><img src='https://example.com/none.png'>.pth",
    "source_sha256": "1378be20" * 8,
    "R&D": "2.10.0",
}
CLASS_NAMES = ["<b>tench</b>", *reference.IMAGENET.meta["categories"][1:]]


def proof(**errors: tuple[float, float, float]) -> Proof:
    """Return a proof with small errors except for ``errors``: stage -> (float64, pytorch32, flax32)."""
    stages = (Stage(name, (4, 112, 112, 64), *errors.get(name, (5e-15, 2e-6, 3e-6))) for name in NAMES)
    return Proof(tuple(stages), LOGITS, LOGITS)


PROVEN = proof()
DIFFERENT = proof(
    conv1=(0.0, 0.0, 0.0),  # exact, so there is no ratio
    maxpool2=(0.03, 2e-6, 0.03),
    inception3a=(np.inf, 2e-6, np.inf),
    fc=(np.nan, 2e-6, np.nan),
    aux1=(5e-15, 2e-6, 9e-6),
)


class Shown(NamedTuple):
    page: Page
    requests: list[str]
    complaints: list[str]


class Show(Protocol):
    def __call__(self, result: Proof, class_names: Sequence[str] | None = None) -> Shown: ...


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        reason = f"there is no browser, none of {', '.join(BROWSERS)}: install the package chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGS)
        yield browser
        browser.close()


WIDTHS = [pytest.param(width, marks=pytest.mark.slow) for width in (400, 1200)]  # a browser takes ten seconds


@pytest.fixture(params=WIDTHS, ids="{}px".format)
def show(request: pytest.FixtureRequest, browser: Browser, tmp_path: Path) -> Iterator[Show]:
    """Renders a page and opens it in a window of this width; records its requests and the browser's complaints."""
    context = browser.new_context(viewport={"width": request.param, "height": 900}, color_scheme="light")

    def open_page(result: Proof, class_names: Sequence[str] | None = None) -> Shown:
        path = tmp_path / "report.html"
        path.write_text(render(result, FACTS, class_names), encoding="utf-8")
        shown = Shown(context.new_page(), [], [])
        shown.page.on("request", lambda request: shown.requests.append(request.url))
        shown.page.on("console", lambda message: shown.complaints.append(message.text))
        shown.page.on("pageerror", lambda error: shown.complaints.append(str(error)))
        shown.page.goto(path.as_uri())
        return shown

    yield open_page
    context.close()


both = pytest.mark.parametrize("result", [PROVEN, DIFFERENT], ids=["proven", "different"])
# For tests that do not depend on the width.
wide = pytest.mark.parametrize("show", [pytest.param(1200, marks=pytest.mark.slow)], indirect=True)


@both
def test_the_page_asks_for_nothing_but_itself(show: Show, result: Proof) -> None:
    shown = show(result, CLASS_NAMES)
    assert shown.requests == [shown.page.url]
    assert shown.complaints == []


@both
def test_the_page_refers_to_no_other_file(result: Proof) -> None:
    page = render(result, FACTS, CLASS_NAMES)
    references = re.findall(r"(?:<[^>]*?(?:src|href)\s*=\s*|url\()[\"']?([^\"'\s>)]*)", page)
    assert len(references) > 2  # the photographs, and the glyphs of the plot
    assert all(target.startswith(("data:image/jpeg;", "#")) for target in references)


@both
def test_the_page_does_not_scroll_sideways(show: Show, result: Proof) -> None:
    page = show(result, ["an exceptionally_long_name_without_any_space_in_it" * 3] * 1000).page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_photographs_and_the_plot_are_drawn(show: Show) -> None:
    page = show(DIFFERENT).page
    for name in ("temple", "flower"):
        photograph = page.get_by_alt_text(name, exact=True)
        expect(photograph).to_be_visible()
        assert photograph.evaluate("image => image.complete && image.naturalWidth") == 640
    plot = page.get_by_role("img", name="logarithmic axis")
    drawn = plot.evaluate_all("plots => plots.map(plot => plot.getBoundingClientRect().toJSON())")
    assert len(drawn) == 1
    assert min(drawn[0]["width"], drawn[0]["height"]) > 300
    for color in ("var(--blue)", "#d55e00", "#009e73"):
        markers = plot.locator(f'use[style*="{color}"]')
        sizes = markers.evaluate_all("uses => uses.map(use => use.getBoundingClientRect().width)")
        assert len(sizes) == len(NAMES) + 1  # one of them in the legend
        assert min(sizes) > 2
    expect(plot.locator("path[style*=dasharray]")).to_have_count(2)  # the limit and its entry in the legend


def test_the_stage_names_in_the_plot_do_not_overlap(show: Show) -> None:
    labels = show(DIFFERENT).page.locator(".plot [id^=ytick] [id^=text]")
    boxes = labels.evaluate_all("labels => labels.map(label => label.getBoundingClientRect().toJSON())")
    assert len(boxes) == len(NAMES)
    assert all(above["bottom"] < below["top"] for above, below in itertools.pairwise(boxes))


@both
def test_every_stage_has_a_row_with_its_verdict(show: Show, result: Proof) -> None:
    rows = show(result).page.locator(".stages tbody tr")
    expect(rows.locator("th")).to_have_text(NAMES)
    expect(rows.locator("td").first).to_have_text("\N{MULTIPLICATION SIGN}".join(("112", "112", "64")))
    expect(rows.locator("td:last-child")).to_have_text(["ok" if stage.ok else "differs" for stage in result.stages])
    # On a narrow screen the numbers scroll, but the verdicts stay visible.
    edges = rows.locator("td:last-child").evaluate_all("cells => cells.map(x => x.getBoundingClientRect().right)")
    assert max(edges) <= rows.page.evaluate("innerWidth")


@pytest.mark.parametrize(
    ("result", "verdict", "color"),
    [
        (PROVEN, "Proven: all stages agree", "rgb(26, 127, 55)"),
        (DIFFERENT, "Not proven: maxpool2 is the first stage that differs", "rgb(197, 34, 31)"),
        (
            proof(conv1=(np.nan, np.nan, np.nan)),
            "Not proven: conv1 is the first stage that differs",
            "rgb(197, 34, 31)",
        ),
    ],
)
def test_the_verdict_names_the_first_stage_that_differs(show: Show, result: Proof, verdict: str, color: str) -> None:
    shown = show(result).page.get_by_text(verdict, exact=True)
    expect(shown).to_be_in_viewport()
    expect(shown).to_have_css("color", color)


@wide
def test_errors_that_are_not_finite_are_described_in_words(show: Show) -> None:
    rows = show(DIFFERENT).page.locator(".stages tbody tr")

    def cells(name: str) -> list[str]:
        return rows.nth(NAMES.index(name)).locator("td").all_inner_texts()[1:]

    assert cells("conv1") == ["0.0e+00", "0.0e+00", "0.0e+00", "\N{EN DASH}", "ok"]
    assert cells("conv2") == ["5.0e-15", "2.0e-06", "3.0e-06", "1.50", "ok"]
    assert cells("maxpool2") == ["3.0e-02", "2.0e-06", "3.0e-02", "2e+04", "differs"]
    assert cells("inception3a") == ["shape differs", "2.0e-06", "shape differs", "\N{EN DASH}", "differs"]
    assert cells("fc") == ["not a number", "2.0e-06", "not a number", "\N{EN DASH}", "differs"]
    assert cells("aux1") == ["5.0e-15", "2.0e-06", "9.0e-06", "4.50", "differs"]


@wide
def test_markup_in_the_facts_is_shown_as_text(show: Show) -> None:
    page = show(PROVEN).page
    expect(page.locator(".facts th")).to_have_text(list(FACTS))
    expect(page.locator(".facts td")).to_have_text(list(FACTS.values()))
    expect(page.locator("script")).to_have_count(0)
    expect(page).not_to_have_title("run")


@pytest.mark.parametrize(
    ("class_names", "first", "last"),
    [
        (CLASS_NAMES, "jay", "<b>tench</b>"),
        (CLASS_NAMES[:5], "class 17", "<b>tench</b>"),
        (None, "class 17", "class 0"),
    ],
    ids=["named", "named in part", "nameless"],
)
@wide
def test_the_five_most_likely_classes_of_both_networks_are_shown(
    show: Show, class_names: list[str] | None, first: str, last: str
) -> None:
    page = show(dataclasses.replace(PROVEN, flax_logits=np.full_like(LOGITS, np.inf)), class_names).page
    lists = page.locator("figure ol")
    expect(lists).to_have_count(4)
    pytorch = lists.nth(0).locator("li")
    expect(pytorch).to_have_count(5)
    expect(pytorch.nth(0)).to_have_text(f"{first}74.9%")
    expect(pytorch.nth(1)).to_have_text(f"{last}0.0%")
    expect(lists.nth(1).locator("b")).to_have_text(["NaN"] * 5)


def test_the_same_proof_gives_the_same_page() -> None:
    assert render(DIFFERENT, FACTS, CLASS_NAMES) == render(DIFFERENT, FACTS, CLASS_NAMES)


def test_a_file_name_that_is_not_unicode_can_be_written() -> None:
    assert rb"caf\xe9.pth" in render(PROVEN, {"source": "caf\udce9.pth"}, None).encode()


def test_characters_that_reverse_text_are_escaped() -> None:
    page = render(PROVEN, {"\u2066<source>": "gpj\u202e.pth\x1b"}, ["\u200fcat"] * 1000)
    assert r"<tr><th>\u2066&lt;source&gt;<td>gpj\u202e.pth\x1b" in page
    assert r"<span>\u200fcat</span>" in page


def test_the_errors_on_a_device_have_a_column_and_count_for_the_verdict() -> None:
    stages = [dataclasses.replace(stage, device32=9e-6 if stage.name == "fc" else 7e-6) for stage in PROVEN.stages]
    page = render(Proof(tuple(stages), LOGITS, LOGITS, "TPU v5e"), FACTS, None)
    assert "TPU v5e" in page
    assert page.count("<td>7.0e-06<td") == len(NAMES) - 1
    assert '<td>9.0e-06<td class="differs">' in page  # the limit is 4 times PyTorch's error, 2e-6
    assert "Not proven: fc is the first stage that differs" in page
    assert "<br>device" not in render(PROVEN, FACTS, None)
