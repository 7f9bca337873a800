"""Pages are opened in headless Chromium, where there is one: every figure is drawn and the console says nothing."""

import pytest

from a1jax.analysis import page, sweep_page
from a1jax.main import main
from a1jax.stages import kept_runs
from a1jax.types import FAILED, Rollout, Trajectory
from tests.analysis import chromium, synthetic_sweep
from tests.analysis.made_up_run import fill
from tests.analysis.synthetic_sweep import Grid

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="needs Chromium: apt-get install chromium")
SMALL = Grid(sizes={"s": (30_000, 16_384), "m": (100_000, 65_536)}, horizons=(32, 64, 128), seeds=(0, 1), of_each=8)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def check(found, path, figures):
    """Nothing went wrong, nothing but the page itself was loaded, nothing is wider than the window, and so many figures are drawn."""
    assert found["errors"] == [] and found["asked"] == [path.resolve().as_uri()]
    assert found["widths"][0] <= found["widths"][1]
    assert len(found["images"]) == figures
    for image in found["images"]:
        assert image["complete"] and min(image["natural"]) > 100 and min(image["shown"]) > 100, image
        assert image["shown"][0] <= found["widths"][1] and image["shown"][0] <= 1.01 * image["natural"][0]


def test_the_page_of_a_sweep_is_drawn(browser, tmp_path):
    folder = synthetic_sweep.write(tmp_path / "s", None, SMALL, missing=["m-128-1-tokens"], failed=["s-32-0-tokens"])
    path = sweep_page.write(folder)
    figures = [file for file in (folder / page.FOLDER).glob("*.csv") if file.stem not in ("cells", "points", "law")]
    found = browser.open(path)
    check(found, path, len(figures))
    names = {image["name"] for image in found["images"]}
    assert {"Success over horizon by size", "Success by size and horizon", "Exchange rate of horizon for parameters"} <= names


def test_the_page_of_a_run_is_drawn(browser, tmp_path):
    path = page.write(fill(tmp_path))
    found = browser.open(path)
    check(found, path, 8)
    assert {"Success by domain", "Expert load", "Stage distill"} <= {image["name"] for image in found["images"]}


def test_the_page_of_show_is_drawn(browser, tmp_path):
    messages = ({"role": "user", "content": "Find it <img src=x onerror=y>"}, {"role": "assistant", "content": "word " * 400 + "w" * 4000})
    run = Trajectory("search", "task-1", messages, (), (), 0.0, FAILED)
    rollout = Rollout("task-1", "search", [1, 2], [0.0, 1.0], [0.0, -0.5], FAILED, 0.0, 1, run)
    kept_runs.write(tmp_path / "evaluations/base.runs.jsonl.gz", [kept_runs.to_trajectory(rollout)])
    path = tmp_path / "show.html"
    assert main(["show", str(tmp_path), "--task", "task-1", "--html", str(path)]) == 0
    check(browser.open(path), path, 0)
    heights = browser.value("JSON.stringify([...document.querySelectorAll('.turn')].map(e => e.getBoundingClientRect().height))")
    assert len(heights) == 2 and heights[0] > 20 and heights[1] > 5 * heights[0]
    assert browser.value("JSON.stringify(getComputedStyle(document.querySelector('.turn.looked')).borderLeftColor)") == "rgb(0, 158, 115)"


def test_what_is_broken_is_seen(browser, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text(
        "<title>t</title><img alt='a' src='data:image/svg+xml,<svg'><img src='gone.png'><script>console.error('no'); f()</script>"
    )
    found = browser.open(path)
    assert [image["natural"] for image in found["images"]] == [[0, 0], [0, 0]] and found["images"][0]["name"] == "a"
    assert any("gone.png" in said for said in found["errors"]) and any("console" in said for said in found["errors"])
    assert any("Uncaught" in said for said in found["errors"]) and len(found["asked"]) == 2
    with pytest.raises(AssertionError):
        check(found, path, 2)
