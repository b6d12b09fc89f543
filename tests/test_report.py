"""The page of a proof, looked at in a real browser."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reference
from playwright.sync_api import Browser, Page, sync_playwright
from proof import Proof, Stage
from report import render

LOGITS = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
RIGHT = Proof(
    tuple(Stage(f"stage{i}", (4, 28, 28, 192), 1e-15, 1e-6, 1.1e-6) for i in range(20)),
    LOGITS,
    LOGITS,
)
WRONG = Proof(
    (
        Stage("conv1", (4, 112, 112, 64), 5e-16, 5e-7, 5e-7),
        Stage("maxpool1", (4, 56, 56, 64), float("inf"), 5e-7, float("inf")),
        Stage("conv2", (4, 56, 56, 64), float("nan"), 0.0, float("nan")),
    ),
    LOGITS[:, :3],
    LOGITS[:, :3] + 1,
)
FACTS = {"source": "<script>document.title = 'run'</script>", "source_sha256": "0123456789abcdef" * 4}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        message = f"no browser to look at the page with: install the package chromium (looked for {', '.join(names)})"
        assert "CI" not in os.environ, message
        pytest.skip(message)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield chromium
        chromium.close()


def open_page(browser: Browser, path: Path, width: int) -> tuple[Page, list[str]]:
    """The page, and what it asked for or complained of beyond itself."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if request.url[:5] not in ("file:", "data:") else None)
    page.goto(path.as_uri())
    return page, noise


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("proof", [RIGHT, WRONG], ids=["right", "wrong"])
def test_a_person_sees_the_whole_page(proof: Proof, width: int, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(proof, FACTS, reference.IMAGENET.meta["categories"]))
    page, noise = open_page(browser, path, width)
    assert noise == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 100)")
    assert pictures == [True, True]
    plot = page.locator(".plot svg").bounding_box()
    assert plot is not None
    assert plot["width"] > 300
    assert plot["height"] > 100
    assert page.locator(".stages tbody tr").count() == len(proof.stages)
    assert page.locator(".verdict").is_visible()
    page.close()


def test_the_verdict_names_the_first_stage_that_is_off(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(RIGHT, FACTS, None))
    page, _ = open_page(browser, path, 1200)
    assert page.locator(".verdict").inner_text() == "Proven: all 20 stages agree."
    assert page.locator(".stages td.bad").count() == 0

    path.write_text(render(WRONG, FACTS, None))
    page.goto(path.as_uri())
    assert page.locator(".verdict").inner_text() == "Not proven: maxpool1 is the first stage that is off."
    assert page.locator(".stages td.bad").count() == 2
    assert page.locator("text=shape differs").count() == 2
    assert page.locator("text=not a number").count() == 2
    page.close()


def test_the_five_likeliest_classes_of_both_stand_side_by_side(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(RIGHT, FACTS, reference.IMAGENET.meta["categories"]))
    page, _ = open_page(browser, path, 1200)
    rows = page.locator("figure").first.locator("tr")
    assert rows.count() == 6
    likeliest = reference.IMAGENET.meta["categories"][int(LOGITS[0].argmax())]
    assert rows.nth(1).inner_text().count(likeliest) == 2
    page.close()


def test_text_from_outside_stays_text(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(WRONG, FACTS, ["<b>", "<i>", "&amp;"]))
    page, _ = open_page(browser, path, 1200)
    assert page.title() == "The port of a GoogLeNet"
    assert FACTS["source"] in page.locator(".facts").inner_text()
    assert "&amp;" in page.locator("figure").first.inner_text()
    page.close()


def test_the_page_refers_to_nothing_outside() -> None:
    page = render(RIGHT, FACTS, None)
    assert not re.search(r"""(src|href)=(?!["']?(data:|#))""", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
