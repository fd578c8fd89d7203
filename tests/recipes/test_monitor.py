"""The monitor's recipe and YAML ask for what the EmojiArtists model knows and never saw."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ctrak_lightning import Concept
from ctrak_lightning.attribution.concept import check_known
from recipes.documentation.monitor import concepts
from recipes.emoji_artists.data import EmojiArtists
from recipes.emoji_artists.demo import ARTISTS
from recipes.emoji_artists.module import EmojiDiffusion

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def task() -> EmojiDiffusion:
    return EmojiDiffusion("lora")


def test_the_concepts_are_of_pairs_that_training_does_not_show(task: EmojiDiffusion) -> None:
    data = EmojiArtists("new", ARTISTS)
    for concept in concepts():
        check_known(concept, task)
        assert isinstance(concept.present, dict)
        pair = (concept.present["object"], concept.present["artist"])
        assert pair in data.held_out
        assert pair not in data.train_set.pairs


def test_the_yaml_fits_the_recipe_that_it_names(task: EmojiDiffusion) -> None:
    facts = yaml.safe_load((ROOT / "callbacks" / "concept_monitor.yaml").read_text())
    arguments = facts["trainer"]["callbacks+"][1]["init_args"]
    for given in arguments["concepts"]:
        check_known(Concept(**given), task)
    batch = next(iter(EmojiArtists("new", ARTISTS, batch_size=2).trace_dataloader()))
    assert arguments["group"] in task.encode(batch).metadata


def test_the_pages_pictures_are_there_and_small() -> None:
    page = (ROOT / "docs" / "tensorboard.md").read_text()
    names = re.findall(r"\]\((images/[^)]+)\)", page)
    assert len(names) == 5
    for name in names:
        path = ROOT / "docs" / name
        assert path.stat().st_size < 400_000
        with Image.open(path) as picture:
            assert picture.width >= 1200
