"""What a reader and a rater see, in a real browser."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gipo_megatron.evaluation.judges.human import import_ratings
from gipo_megatron.evaluation.types import FIRST, SECOND, TIE
from tests.evaluation.chromium import PROGRAM, Browser, browser
from tests.evaluation.simulated import MARKUP
from tests.evaluation.test_comparison_report import evaluate
from tests.evaluation.test_human import MINE, page_data, pairs, write_pages

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium, chromium-browser or google-chrome on the path"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def test_the_report(chromium: Browser, tmp_path: Path) -> None:
    path = evaluate(tmp_path)
    chromium.open(path)
    assert chromium.errors == [] and chromium.requests == [path.as_uri()]
    assert chromium.value("document.title") == "gipo <b>: win / tie / lose"
    assert chromium.value("document.images[0].naturalWidth") == 10  # the SVG is drawn
    assert chromium.value("document.querySelectorAll('script, iframe, main img').length") == 0
    shown = chromium.value("document.querySelector('.comparison .two .text').textContent")
    assert MARKUP.replace("\x00", "\\x00") in shown
    # wide tables scroll by themselves
    assert chromium.value("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_script_could_not_run_in_the_report(chromium: Browser, tmp_path: Path) -> None:
    """Were a tag to slip through one day, the page's policy still forbids it: planted here by
    hand."""
    path = evaluate(tmp_path)
    planted = "<script>document.title='owned'</script><img src='https://example.org/x.png'>"
    path.write_text(
        path.read_text(encoding="utf-8").replace("</body>", f"{planted}</body>"), encoding="utf-8"
    )
    chromium.open(path)
    assert chromium.value("document.title") == "gipo <b>: win / tie / lose"
    blocked = [e for e in chromium.errors if "Content Security Policy" in e]
    assert len(blocked) == 2


def test_a_rater_finishes_by_keyboard(chromium: Browser, tmp_path: Path) -> None:
    page, other = write_pages(tmp_path, pairs(20, markup=True), ["ann", "bob"], 10, 0.0, 5)
    chromium.open(page)
    count = "document.getElementById('count').textContent"
    items = page_data(page)["items"]
    assert (
        chromium.value("document.getElementById('left').textContent") == items[0]["left"]
        and MARKUP in items[0]["left"]
    )
    assert (
        chromium.value("document.title") == "Which answer is better?"
        and chromium.value("document.images.length") == 0
    )
    assert chromium.value(count) == "0 of 10"
    wanted = {}
    for i, item in enumerate(items[:6]):
        mine = "1" if item["left"].startswith(MINE) else "2"
        wanted[item["id"]] = FIRST
        chromium.press("3")  # means nothing
        chromium.press("1", modifiers=2)  # Ctrl-1 is the browser's
        chromium.press(mine)
        assert chromium.value(count) == f"{i + 1} of 10"
    chromium.press("ArrowLeft")
    chromium.press("ArrowLeft")
    assert chromium.value("document.getElementById('title').textContent") == "Pair 5"
    chromium.press("0")  # a tie instead
    wanted[items[4]["id"]] = TIE
    chromium.reload()
    assert (
        chromium.value(count) == "6 of 10"
        and chromium.value("document.getElementById('title').textContent") == "Pair 6"
    )
    chromium.press("ArrowRight")
    chromium.press("ArrowRight")  # no further than what is rated
    assert chromium.value("document.getElementById('title').textContent") == "Pair 7"
    for item in items[6:]:
        chromium.press("2" if item["left"].startswith(MINE) else "1")
        wanted[item["id"]] = SECOND
    assert (
        chromium.value("document.getElementById('end').hidden") is False
        and chromium.value(count) == "10 of 10"
    )
    chromium.press("1")  # after the end: nothing
    chromium.call(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "down")
    )
    chromium.value("document.getElementById('download-end').click()")
    file = tmp_path / "down/ratings_ann.json"
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
        chromium.value("1")
    assert json.loads(file.read_text()) == json.loads(
        chromium.value("document.getElementById('text').value")
    )
    ratings = import_ratings([file], page.parent / "key.json")
    assert {pair: votes["ann"] for pair, votes in ratings.votes.items()} == wanted and len(
        wanted
    ) == 10
    assert chromium.errors == [] and chromium.requests == [page.as_uri()] * 2
    for _ in range(5):  # Chromium gives about one load in a hundred of a file an empty store
        chromium.open(page)
        if chromium.value(count) != "0 of 10":
            break
    assert chromium.value(count) == "10 of 10"  # another tab has it, too
    chromium.open(other)
    assert chromium.value(count) == "0 of 10"  # one rater's state is not another's
