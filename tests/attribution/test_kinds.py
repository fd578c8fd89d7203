"""Every kind of question: about a generated image, an existing one, a part of one, or none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrak_lightning import Attributor, Concept, DiffusionTask, GradientTracer, Projection
from ctrak_lightning.attribution.queries import weights_of
from ctrak_lightning.capture.trace import trace_query
from ctrak_lightning.errors import ConceptError, TaskError
from ctrak_lightning.methods.objectives import ConceptDirection, SquaredNorm, Term
from ctrak_lightning.methods.trajectories import Noised, State
from ctrak_lightning.provenance import Ledger
from ctrak_lightning.provenance.recording import record_run
from ctrak_lightning.tasks import whole

from ..provenance.builder import run_facts
from ..toy import ToyDiffusion, Toys
from .test_attributor import BAR, METHODS, RED, SAMPLER, traced

METHOD = METHODS["per_sample"]
PICTURE = Toys()[1]["image"].clamp(-1, 1)
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1


def asked(concept: Concept, **rest: Any) -> Concept:
    return Concept(concept.name, concept.present, concept.absent, **rest)


class Seeing(ToyDiffusion):
    """The toy, with what questions about existing images need."""

    def latents(self, images: Tensor) -> Tensor:
        return images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def module(folder: Path) -> ToyDiffusion:
    """The toy, traced at one checkpoint."""
    plain = traced(folder / "s", METHOD, steps=(1,))
    seeing = Seeing().double()
    seeing.load_state_dict(plain.state_dict())
    return seeing


def attributor(folder: Path, module: ToyDiffusion, **options: Any) -> Attributor:
    return Attributor(folder / "s", module, **({"sampler": SAMPLER} | options))


def test_a_mixed_list_is_asked_as_each_is_alone(folder: Path, module: ToyDiffusion) -> None:
    asker = attributor(folder, module)
    mixed = [asked(RED, image=PICTURE), BAR, asked(RED, image=None), asked(BAR, mask=LEFT)]
    seeds = [0, 4, 7, 4]
    together = asker.query(mixed, seeds, images=2, parts=True)
    assert together.concepts == mixed
    assert together.seeds == seeds
    for i, (concept, seed) in enumerate(zip(mixed, seeds, strict=True)):
        alone = asker.query([concept], seed, images=2)
        torch.testing.assert_close(
            together.features[:, i], alone.features[:, 0], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(together.strength[i], alone.strength[0], rtol=1e-4, atol=1e-7)
        assert together.images is not None
        assert alone.images is not None
        torch.testing.assert_close(together.images[i], alone.images[0], rtol=1e-4, atol=1e-5)
        assert together.parts is not None
        [part] = together.parts[i]
        whole = together.features[0, i]
        torch.testing.assert_close(part.by_timestep.sum(0)[0], whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.stack(list(part.by_layer_group.values())).sum(0)[0], whole, rtol=1e-4, atol=1e-5
        )
    answers = asker.attribute_many(mixed, seeds, images=2)
    torch.testing.assert_close(
        answers[2].checkpoint_scores, asker.score(together)[2].checkpoint_scores
    )
    with pytest.raises(
        ValueError, match="expected one image for each concept, and no concept with an image"
    ):
        asker.query(mixed[:2], 0, generation=asker.generate([RED.present] * 2, [0, 1]))


def test_a_concept_without_an_image_is_a_global_query(folder: Path, module: ToyDiffusion) -> None:
    asker = attributor(folder, module)
    expected = asker.query_global([RED, BAR], 7, images=3)
    found = asker.query([asked(RED, image=None), asked(BAR, image=None)], 7, images=3)
    assert torch.equal(found.features, expected.features)
    with pytest.raises(ValueError, match="images=0"):
        asker.query([asked(RED, image=None)], images=0)


def test_an_existing_image_is_followed_back_to_its_generation(
    folder: Path, module: ToyDiffusion
) -> None:
    """An image of our own generation, given as if it were not, gets the answer of the
    generation."""
    sampler = replace(SAMPLER, guidance=1.0)
    asker = attributor(folder, module, sampler=sampler)
    generated = asker.query([RED, BAR], [4, 5])
    latents = asker.generate([RED.present, BAR.present], [4, 5]).latents
    found = asker.query_given([RED, BAR], latents)
    torch.testing.assert_close(found.features, generated.features, rtol=1e-3, atol=1e-3)
    assert found.trajectories == [None, None]
    guided = attributor(folder, module)  # is inverted without the guidance all the same
    torch.testing.assert_close(guided.query_given([RED, BAR], latents).features, found.features)
    asked_twice = asker.invert([RED.present, BAR.present, RED.present], latents[[0, 1, 0]])
    assert torch.equal(asked_twice.states[0].x_t[0], asked_twice.states[0].x_t[2])
    assert not torch.equal(asked_twice.states[0].x_t[0], asked_twice.states[0].x_t[1])
    noised = attributor(folder, module, sampler=sampler, given="noised").query_given(
        [RED, BAR], latents
    )
    assert noised.trajectories == [Noised(timesteps=2)] * 2
    assert not torch.allclose(noised.features, generated.features, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match=r"given='seen'.*'inverted', 'noised'"):
        attributor(folder, module, given="seen")


def test_an_image_goes_through_the_tasks_own_latents(folder: Path, module: ToyDiffusion) -> None:
    asker = attributor(folder, module)
    concept = asked(RED, image=PICTURE)
    expected = asker.query_given([RED], PICTURE[None])
    torch.testing.assert_close(asker.query([concept]).features, expected.features)
    result = asker.attribute(concept)
    assert result.image is not None
    torch.testing.assert_close(result.image, (PICTURE + 1) / 2, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ConceptError,
        match=r"image of \[3, 4, 4\].*its latents are \[3, 4, 4\], expected \[3, 8, 8\].*HINT: resize",
    ):
        asker.query([asked(RED, image=PICTURE[:, :4, :4])])
    blind = ToyDiffusion().double()
    blind.load_state_dict(module.state_dict())
    with pytest.raises(
        TaskError, match=r"ToyDiffusion has no `latents`.*latents\(images \[B, 3, H, W\]"
    ):
        attributor(folder, blind).query([concept])


def test_what_was_asked_is_noted_without_the_pictures(
    folder: Path, module: ToyDiffusion, tmp_path: Path
) -> None:
    record_run(folder / "s", run_facts(folder / "s"), resumed=False)
    concept = asked(RED, image=PICTURE, mask=LEFT)
    result = attributor(folder, module).attribute(concept)
    noted = Ledger(folder / "s").entries()[-1].facts["concept"]
    asked_of = concept.to_dict()
    for picture in (
        "image",
        "mask",
    ):  # a digest that anybody could make would confirm a guess of what was asked about
        assert noted[picture]["shape"] == asked_of[picture]["shape"]
        assert noted[picture]["sha256"] != asked_of[picture]["sha256"]
    assert noted["image"]["sha256"] != noted["mask"]["sha256"]
    assert noted | {"image": None, "mask": None} == asked_of | {"image": None, "mask": None}
    result.to_json(tmp_path / "r.json")
    assert asked_of["mask"]["sha256"] in (tmp_path / "r.json").read_text()
    assert len((tmp_path / "r.json").read_text()) < 20_000


EXACT = Projection(rank=100_000, dim=None)


@pytest.mark.parametrize("objective", [SquaredNorm(), ConceptDirection()])
def test_the_gradient_of_a_part_is_that_of_the_masked_objective(objective: Any) -> None:
    """Unprojected: inner products of our features are those of plain gradients of ``mean(w l(e))``,
    sample by sample."""
    module = ToyDiffusion().double().eval()
    tracer = GradientTracer(module.denoiser, EXACT)
    torch.manual_seed(0)
    x0, weights = torch.randn(3, 3, 8, 8).double(), torch.rand(3, 3, 8, 8).double()
    state = State(torch.randn(3, 3, 8, 8).double(), torch.tensor([30, 30, 30]))
    sides = {"present": module.condition(RED.present, 3), "absent": module.condition(RED.absent, 3)}
    method = replace(METHOD, query=(Term(objective),), training=objective, normalisation="none")

    def features(w: Tensor | None) -> Tensor:
        return trace_query(module, tracer, method, [state], x0, sides, weights=w).features  # type: ignore[arg-type]

    rows = []
    for i in range(3):
        e, other = (
            module.predict(
                state.x_t[i : i + 1],
                state.t[:1],
                {k: v[i : i + 1].detach() for k, v in side.items()},
            )
            for side in (sides["present"], sides["absent"])
        )
        # Concept-TRAK's loss: the target, e plus the concept's direction, stands still.
        target = (
            (e + (e - other)).detach()
            if isinstance(objective, ConceptDirection)
            else torch.zeros_like(e)
        )
        loss = (weights[i] * (target - e).square()).mean()
        gradients = torch.autograd.grad(loss, list(module.denoiser.parameters()), allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    expected = torch.stack(rows)
    ours = features(weights).double()
    torch.testing.assert_close(ours @ ours.T, expected @ expected.T, rtol=1e-4, atol=1e-9)
    # Complementary regions add up to the whole.
    region = (weights > 0.5).double()
    torch.testing.assert_close(
        features(region) + features(1 - region), features(None), rtol=1e-4, atol=1e-6
    )


def test_a_part_is_normalised_after_the_mask(folder: Path, module: ToyDiffusion) -> None:
    asker = attributor(folder, module)
    concepts = [
        RED,
        asked(RED, mask=torch.ones(8, 8)),
        asked(RED, mask=LEFT * 0.5),
        asked(RED, mask=LEFT.bool()),
    ]
    found = asker.query([*concepts, asked(RED, mask=1 - LEFT)], 4)
    whole, ones, half, left, right = found.features[0]
    torch.testing.assert_close(ones, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(half, left, rtol=1e-4, atol=1e-6)  # a factor is no matter
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) < 0.9
    state_norms = asker.query([concepts[2]], 4, parts=True).parts[0][0].by_timestep.norm(dim=-1)  # type: ignore[index]
    torch.testing.assert_close(state_norms, torch.ones_like(state_norms))
    # How strong a concept is, is measured in its part too.
    assert abs(float(found.strength[3] - found.strength[0])) > 1e-6


def test_masks_become_weights_of_latents() -> None:
    like = torch.zeros(2, 3, 2, 4)
    mask = torch.zeros(8, 16)
    mask[:4, :4] = 1
    mask[4:, 8:10] = 1
    masked = asked(RED, mask=mask)
    found = weights_of(whole(DiffusionTask()), [masked, RED], like)
    assert found is not None
    assert found[0].tolist() == [[[1, 0, 0, 0], [0, 0, 0.5, 0]]] * 3
    assert torch.equal(found[1], torch.ones(3, 2, 4))
    assert weights_of(whole(DiffusionTask()), [RED, BAR], like) is None
    for wrong in (mask[:, :8], mask.T, mask[::8, ::8]):
        with pytest.raises(ConceptError, match=r"whose latents are \[2, 4\].*HINT"):
            weights_of(whole(DiffusionTask()), [asked(RED, mask=wrong)], like[:1])
    packed = torch.zeros(1, 8, 5)  # positions, channels

    class Packing(DiffusionTask):
        def latent_mask(self, mask: Tensor) -> Tensor:
            return mask.reshape(2, 4, 4, 4).mean((1, 3)).reshape(8, 1)

    found = weights_of(Packing(), [masked], packed)
    assert found is not None
    assert found[0, :, 0].tolist() == [1, 0, 0, 0, 0, 0, 0.5, 0]
    with pytest.raises(
        TaskError, match=r"latent_mask.*returned \[8, 1\], expected weights of a latent \[6, 5\]"
    ):
        weights_of(Packing(), [masked], packed[:, :6])
    with pytest.raises(TaskError, match=r"DiffusionTask has latents \[8, 5\] and no `latent_mask`"):
        weights_of(whole(DiffusionTask()), [masked], packed)
