"""The pictures of docs/tensorboard.md: what TensorBoard shows of a run of
``recipes.documentation.monitor``; and docs/report.md's, of the page that ``make demo`` writes.

python -m recipes.documentation.screenshots     # after `make demo`: demo/report.html as
docs/images/report.png
"""

import io
import time
from pathlib import Path

from PIL import Image

from .browser import Page, chromium, serving

SETTLED = 3.0
"""Seconds that charts and points take to come to rest."""


def take(board: Path, folder: Path) -> None:
    """Writes ``tensorboard_*.png`` of the run under ``board`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with serving(board) as url:
        with chromium(1400, 1180) as page:
            _images(page, url)
            _save(page, folder / "tensorboard_images.png")
        with chromium(1500, 1000) as page:
            _text(page, url)
            _save(page, folder / "tensorboard_text.png")
            _projector(page, url)
            _save(page, folder / "tensorboard_projector.png")
        with chromium(1500, 1360) as page:
            _custom_scalars(page, url)
            _save(page, folder / "tensorboard_custom_scalars.png")
        with chromium(1800, 560) as page:
            page.open(f"{url}#hparams")
            page.until_text("ctrak/method", "concept_trak")
            _save(page, folder / "tensorboard_hparams.png")


def take_report(report: Path, path: Path) -> None:
    """Writes the head of a report's page, without the notes on how to read it, to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with chromium(1180, 1660) as page:
        page.open(report.resolve().as_uri())
        page.until_text("Images that taught it")
        page.driver.execute_script("document.querySelector('.reading').remove()")
        _save(page, path)


def _images(page: Page, url: str) -> None:
    page.open(f"{url}#images&tagFilter=christmas")
    page.until(lambda: page.find_all("img[src*='images']"), "an image")
    page.click_all("paper-checkbox", "Show actual image size")
    image = page.find_all("img[src*='images']")[0]
    page.until(lambda: image.size["width"] > 600, "the image at its own size")
    time.sleep(SETTLED)


def _text(page: Page, url: str) -> None:
    page.open(f"{url}#text&tagFilter=christmas")
    page.until_text("Proponents", "Opponents")


def _projector(page: Page, url: str) -> None:
    page.open(f"{url}#projector")
    page.until_text("Points: 192", "score christmas-tree")
    time.sleep(SETTLED)


def _custom_scalars(page: Page, url: str) -> None:
    page.open(f"{url}#custom_scalars&_smoothingWeight=0")
    page.until_text("christmas-tree: share by owner", "Matches")
    page.click_all("paper-checkbox", "Ignore outliers in chart scaling")
    for legend in page.find_all(".toggle-matches-button")[:3]:
        page.driver.execute_script("arguments[0].click()", legend)
    time.sleep(SETTLED)


def _save(page: Page, path: Path) -> None:
    picture = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    take_report(Path("demo/report.html"), Path("docs/images/report.png"))
