"""What ConceptMonitor logged, as a real TensorBoard shows it in a real browser."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from ctrak_lightning import Encoded, TraceStore
from ctrak_lightning.panels.grid import Geometry

from ..lenient import lenient
from .test_concept_monitor import NAMES, RED, Logging, curves, events, fit, monitor, tracer

pytest.importorskip("selenium")
from recipes.documentation.browser import Page, chromium, is_available, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason="needs chromium and chromedriver"),
]
SCRIPT = "<img src=x onerror='window.top.hacked = 1'><script>window.top.hacked = 1</script>"
RING = {"name": "a ring | 猫", "present": {"shape": "ring"}, "absent": {}}
BYTES = """
const [url, done] = arguments;
fetch(url).then(r => r.blob()).then(blob => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(',')[1]);
  reader.readAsDataURL(blob);
});
"""


class Hostile(Logging):
    """Captions and an owner that try to run a script."""

    def encode(self, batch: dict[str, Any]) -> Encoded:
        encoded = super().encode(batch)
        encoded.metadata["caption"] = [f"{SCRIPT} | {shape}" for shape in batch["shape"]]
        encoded.metadata["owner"] = [
            name.replace("owner of red", SCRIPT) for name in encoded.metadata["owner"]
        ]
        return encoded


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Page]]:
    """A finished run of two checkpoints, the address of its TensorBoard, and a browser."""
    path = tmp_path_factory.mktemp("board")
    L.seed_everything(4, verbose=False)
    with lenient():
        fit(path, [tracer(path), monitor([RED, RING])], Hostile())
    with serving(path / "board") as url, chromium() as page:
        yield path, url, page


@pytest.fixture(autouse=True)
def _nothing_hostile_ran(board: tuple[Path, str, Page]) -> Iterator[None]:
    yield
    assert board[2].driver.execute_script("return window.hacked === undefined")


def test_images_are_those_that_were_logged(board: tuple[Path, str, Page]) -> None:
    path, url, page = board
    page.open(f"{url}#images")
    page.until(lambda: len(page.find_all("img[src*='images']")) == 2, "two images")
    found = events(path)
    width = Geometry(8, 4).size[0]
    page.until(
        lambda: all(
            img.get_property("naturalWidth") == width for img in page.find_all("img[src*='images']")
        ),
        "whole images",
    )
    shown = {
        base64.b64decode(page.driver.execute_async_script(BYTES, img.get_property("src")))
        for img in page.find_all("img[src*='images']")
    }
    assert shown == {
        found.Images(f"ctrak/concept/{name}")[-1].encoded_image_string for name in NAMES
    }


def test_text_shows_the_ranking_and_hostile_captions_as_they_are(
    board: tuple[Path, str, Page],
) -> None:
    path, url, page = board
    page.open(f"{url}#text")
    samples = TraceStore(path / "traces").samples
    page.until_text(
        "Proponents", "Opponents", "Shares by owner", "a ring | 猫", *samples.sample_ids[:3]
    )
    assert page.text().count(f"{SCRIPT} | ring") >= 3
    assert not page.find_all("td img, td script")
    cells = [cell.text for cell in page.find_all("td")]
    assert f"{SCRIPT} | dot" in cells


def test_custom_scalars_group_the_curves(board: tuple[Path, str, Page]) -> None:
    _, url, page = board
    page.open(f"{url}#custom_scalars")
    page.until_text(
        "ctrak: shares", "red: share by owner", "a ring | 猫: share by owner", "Matches (3)"
    )
    page.until_text(
        "concept strength", "effective number of contributors", "seconds per checkpoint"
    )
    assert page.text().count("Matches (3)") == 3
    assert page.text().count("Matches (2)") == 4


def test_scalars_and_histograms_are_there(board: tuple[Path, str, Page]) -> None:
    path, url, page = board
    tags = [tag for tag in curves(events(path)) if tag.startswith("ctrak/")]
    page.open(f"{url}#scalars&_smoothingWeight=0")
    page.until_text("loss_step")
    page.until_text(f"ctrak {len(tags)}")
    page.open(f"{url}#histograms")
    page.until_text(*(f"ctrak/scores/{name}" for name in NAMES))
    page.open(f"{url}#timeseries")
    page.until_text("ctrak", f"{len(tags) + 2 * 2} cards")


def test_hparams_show_the_method_and_the_final_numbers(board: tuple[Path, str, Page]) -> None:
    path, url, page = board
    page.open(f"{url}#hparams")
    page.until_text("ctrak/method", "concept_trak", "width", "ctrak/strength/red")
    strength = curves(events(path))["ctrak/strength/red"][5]
    # Five significant digits, rounded, as the dashboard shows numbers.
    page.until_text(f"{strength:.5g}"[:6])


def test_the_projector_shows_points_and_their_metadata(board: tuple[Path, str, Page]) -> None:
    path, url, page = board
    page.open(f"{url}#projector")
    page.until_text(
        "Points: 12", "Dimension: 12", "owner", "caption", "score red", "score a ring | 猫"
    )
    sprite = (path / "board" / "00005" / "ctrak" / "sprite.png").read_bytes()
    query = "data/plugin/projector/sprite_image?run=.&name=ctrak%3A00005"
    assert base64.b64decode(page.driver.execute_async_script(BYTES, url + query)) == sprite
