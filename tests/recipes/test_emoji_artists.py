import json
from pathlib import Path

import pytest
import torch

from ctrak_lightning import TraceStore
from ctrak_lightning.traces import SampleTable
from recipes.emoji_artists.data import NEW_ARTISTS, Emoji, EmojiArtists
from recipes.emoji_artists.demo import main
from recipes.emoji_artists.evaluate import KINDS, chance, label_search, questions, r_precision
from recipes.emoji_artists.module import EmojiDiffusion
from recipes.emoji_artists.network import patchify, unpatchify


def test_the_splits_share_no_object_and_hold_one_pair_per_object_out() -> None:
    base, new = EmojiArtists("base"), EmojiArtists("new")
    base_pairs, new_pairs = set(base.train_set.pairs), set(new.train_set.pairs)
    assert (len(base_pairs), len(new_pairs), len(new.held_out)) == (2400, 448, 64)
    assert not {name for name, _ in base_pairs} & {name for name, _ in new_pairs}
    assert not {artist for _, artist in base_pairs} & set(NEW_ARTISTS)
    assert not new_pairs & set(new.held_out)
    assert len({name for name, _ in new.held_out}) == 64
    per_artist = [sum(a == artist for _, a in new.held_out) for artist in Emoji.load().artists]
    assert per_artist == [8] * 8
    emoji = Emoji.load()
    item = new.train_set[5]
    pixels = emoji.images[emoji.objects.index(item["object"]), emoji.artists.index(item["artist"])]
    assert torch.equal(
        ((item["image"] + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels)
    )
    with pytest.raises(ValueError, match="unknown.*Known: noto"):
        EmojiArtists("new", ["nota"])


def test_r_precision_by_hand() -> None:
    samples = SampleTable(
        ["a", "b", "c", "d", "e"],
        [""] * 5,
        {"object": ["owl", "owl", "cat", "cat", "owl"], "artist": ["x", "y", "x", "y", "z"]},
    )
    asked = questions([("owl", "x")])
    assert [question.kind for question in asked] == list(KINDS)
    scores = [torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 9.0, 2.0, 0.0, -1.0])]
    found = r_precision(asked, scores, samples)
    assert found["object"] == pytest.approx(2 / 3)  # owls: a, b, e; the top three are a, b, c
    assert found["artist"] == pytest.approx(1 / 2)  # of x: a, c; the top two are b, c
    assert chance(asked, samples) == pytest.approx({"object": 3 / 5, "artist": 2 / 5})
    best = [label_search(question, samples) for question in asked]
    assert r_precision(asked, best, samples) == {"object": 1.0, "artist": 1.0}


def test_lora_trains_the_adapter_and_the_new_tokens_only() -> None:
    module = EmojiDiffusion("lora")
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {"artist.new", "object.new"} < trained
    assert all("lora_" in name for name in trained - {"artist.new", "object.new"})
    assert len(module.known_attributes()["object"]) == 464
    full = EmojiDiffusion("full")
    assert all(p.requires_grad for p in full.parameters())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(unpatchify(patchify(images)), images)


def test_dropped_tokens_are_the_null_token() -> None:
    module = EmojiDiffusion("lora")
    both = module.condition({"object": "owl", "artist": "noto"}, 1)["encoder_hidden_states"]
    artist = module.condition({"artist": "noto"}, 1)["encoder_hidden_states"]
    null = module.condition({}, 1)["encoder_hidden_states"]
    assert torch.equal(both[:, :4], artist[:, :4])
    assert torch.equal(artist[:, 4:], null[:, 4:])
    assert not torch.equal(both[:, 4:], artist[:, 4:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_demo_runs_and_reports_what_it_did(tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "demo"), "--epochs", "3", "--artists", "noto,openmoji"])
    assert len(list((tmp_path / "demo" / "sheets").glob("*.png"))) == 64
    facts = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert facts["r_precision"]["label_search"] == {"object": 1.0, "artist": 1.0}
    for name in ("concept_trak", "contrastive_d_trak", "trak"):
        store = TraceStore(tmp_path / "demo" / "traces" / name)
        assert (len(store), [c.step for c in store.checkpoints]) == (64, [2, 4, 6])
        assert store.verify() == []
    with pytest.raises(ValueError, match="holds other files"):
        main(["--out", str(Path(__file__).parent)])
