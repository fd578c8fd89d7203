"""Attributor against a dense reference: a per-sample loop for every gradient and numpy for the
rest."""

import copy
import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from ctrak_lightning import (
    Attributor,
    Concept,
    GradientTracer,
    Method,
    Projection,
    Sampler,
    TraceStore,
    methods,
)
from ctrak_lightning.capture.capture import Capture
from ctrak_lightning.errors import (
    ConceptError,
    CorruptStoreError,
    GradientError,
    StoreError,
    StoreMismatchError,
    TaskError,
)
from ctrak_lightning.methods.damping import AGREEMENT_GRID
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    ConceptDirection,
    Denoising,
    Joint,
    Prediction,
    SquaredNorm,
    Term,
    contrast,
)
from ctrak_lightning.methods.trajectories import Generated, Noised, Renoised, State
from ctrak_lightning.utilities.rng import seeded_noise

from ..toy import QuickDiffusion, ToyData, ToyDiffusion

RED = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})
BAR = Concept("bar", {"colour": "red", "shape": "bar"}, {"colour": "red"})
SAMPLER = Sampler(steps=6, guidance=2.0)
JOINT = Joint(SquaredNorm(), ChannelProbe(1), Denoising())
METHODS = {
    "concept_trak_paper": methods.concept_trak_paper(
        timesteps=2, inversion_steps=4, guidance=2.0, damping=1.0
    ),
    "concept_trak": methods.concept_trak(timesteps=2, damping=1.0, channel_probes=1),
    "concept_trak_norm": methods.concept_trak_norm(timesteps=2, damping=1.0),
    "trak": methods.trak(timesteps=2),
    "d_trak": methods.d_trak(timesteps=2),
    "per_sample": methods.concept_trak_norm(timesteps=2, damping=1.0, normalisation="sample"),
    "two_sided": replace(
        methods.concept_trak_paper(timesteps=2, inversion_steps=4, damping=1.0),
        query=(Term(ConceptDirection(), "present"), Term(ConceptDirection(), "absent")),
    ),
    "joint": replace(
        methods.concept_trak_norm(timesteps=2, damping=1.0), training=JOINT, query=contrast(JOINT)
    ),
    "das": methods.das(timesteps=2),
    "das_absolute": methods.das(timesteps=2, absolute=True),
    "journey_trak": methods.journey_trak(timesteps=2),
    "tracin": methods.tracin(timesteps=2),
    "retrac": methods.retrac(timesteps=2),
}
ON_UNET = ("concept_trak_paper", "concept_trak", "concept_trak_norm", "trak")
LEARNING_RATES = {1: 1e-3, 2: 4e-4}


_MADE = tempfile.TemporaryDirectory()


def traced(
    path: Path,
    method: Method,
    copies: int = 1,
    steps: tuple[int, ...] = (1, 2),
    kind: type[ToyDiffusion] = ToyDiffusion,
) -> ToyDiffusion:
    """A module traced at two checkpoints (by default), with different weights; float64, since
    concept directions are small differences. The same for the same arguments: made once in a
    process, and copied."""
    original, module = _traced(method, copies, steps, kind)
    shutil.copytree(original, path, dirs_exist_ok=True)
    return copy.deepcopy(module)


@functools.cache
def _traced(
    method: Method, copies: int, steps: tuple[int, ...], kind: type[ToyDiffusion]
) -> tuple[Path, ToyDiffusion]:
    path = Path(tempfile.mkdtemp(dir=_MADE.name))
    module = kind().double()
    batches = list(ToyData(batch_size=5, copies=copies).train_dataloader())
    loader = torch.utils.data.DataLoader(ToyData(copies=copies).toys, 5)
    capture = Capture(
        str(path),
        module,
        module,
        loader,
        method=method,
        tracer=GradientTracer(module.denoiser, Projection(rank=4, dim=64)),
        progress=False,
    )
    optimizer = module.configure_optimizers()
    for step in steps:
        for batch in batches:
            optimizer.zero_grad()
            with torch.random.fork_rng():
                torch.manual_seed(step)
                module.training_step(batch | {"image": batch["image"].double()}, 0).backward()
            optimizer.step()
        capture.run(step, epoch=0, learning_rate=LEARNING_RATES[step])
    capture.writer.close()
    return path, module


def dense_scores(
    module: ToyDiffusion, store: TraceStore, method: Method, concept: Concept, seed: int
) -> np.ndarray:
    """The whole chain again, one sample, one state, one condition at a time; [M, N]."""
    schedule = module.noise_schedule
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=64), engine="loop")
    noise = seeded_noise([3, 8, 8], seed, 0, "generation")[None].double()

    def sides_now() -> dict[str, dict[str, Tensor]]:
        """The embeddings are trained too: each checkpoint has its own."""
        return {
            "present": module.condition(concept.present, 1),
            "absent": module.condition(concept.absent, 1),
        }

    def load(index: int) -> None:
        module.load_state_dict(store.checkpoints[index].weights(), strict=False)

    def unit(x: Tensor, salt: int) -> Tensor:
        features = tracer.sketch(x[None], unit_layers=method.normalisation == "layer", salt=salt)[0]
        return features / features.norm() if method.normalisation == "sample" else features

    @torch.no_grad()
    def clean(state: State, condition: Any) -> Tensor:
        """x0_hat from the noise prediction, under guidance."""
        with_concept, without = (
            module.predict(state.x_t, state.t, c) for c in (condition, module.condition({}, 1))
        )
        a, s = schedule.levels(state.t, state.x_t)
        return (state.x_t - s * (without + SAMPLER.guidance * (with_concept - without))) / a

    @torch.no_grad()
    def loss(state: State, x0: Tensor, condition: Any) -> float:
        a, s = schedule.levels(state.t, state.x_t)
        noise = (state.x_t - a * x0) / s
        return float((module.predict(state.x_t, state.t, condition) - noise).square().mean())

    def vjp(
        objective: Any, x_t: Tensor, t: Tensor, x0: Tensor, condition: Any, reference: Tensor | None
    ) -> Tensor:
        x = x_t.detach().requires_grad_()
        cell = {}

        def forward(rows: Tensor) -> Tensor:
            output = module.predict(x, t, condition)
            e = schedule.epsilon(output, x, t)
            cell["p"] = Prediction(x, t, x0, output, e, reference, schedule)
            return e

        return tracer.vjps(
            forward, [lambda e, rows: objective.cotangent(cell["p"])], 1, sketch=False
        )[0][0]

    module.eval()
    load(-1)
    with torch.no_grad():
        generation = SAMPLER.run(module, noise, sides_now()["present"], module.condition({}, 1))
        # The generation's own predictions of the clean image, made with the last checkpoint's
        # weights.
        predicted = [clean(state, sides_now()["present"]) for state in generation.states]
    scores = []
    for index in range(len(store.checkpoints)):
        load(index)
        sides = sides_now()
        rows, losses = [], []
        for item in ToyData().toys:
            encoded = module.encode(
                {k: (v[None] if isinstance(v, Tensor) else [v]) for k, v in item.items()}
            )
            with torch.no_grad():
                states = list(
                    method.training_trajectory.states(
                        module, encoded.latents, encoded.condition, encoded.sample_ids, 0
                    )
                )
            rows.append(
                sum(
                    unit(vjp(part, s.x_t, s.t, encoded.latents, encoded.condition, None), salt)
                    for s in states
                    for salt, part in enumerate(method.training.parts)
                )
            )
            each = [loss(state, encoded.latents, encoded.condition) for state in states]
            losses.append(sum(each) / len(each))
        if isinstance(method.query_trajectory, Renoised):
            states = []
            for i in (1, 4):  # of six states, evenly
                t = generation.states[i].t
                eps = seeded_noise([3, 8, 8], 0, int(t), "renoised")[None].double()
                states.append(State(schedule.add_noise(predicted[i], eps, t), t, predicted[i]))
        elif isinstance(method.query_trajectory, Generated):
            states = method.query_trajectory.select(generation, schedule)
        else:
            states = list(
                method.query_trajectory.states(
                    module, generation.latents, sides["present"], ["x"], 0
                )
            )
        query = torch.zeros(64)
        for state in states:
            with torch.no_grad():
                others = {
                    side: schedule.epsilon(
                        module.predict(state.x_t, state.t, sides[other]), state.x_t, state.t
                    )
                    for side, other in (("present", "absent"), ("absent", "present"))
                }
            for salt in range(len(method.training.parts)):
                terms = [
                    term.weight
                    * vjp(
                        term.objective.parts[salt],
                        state.x_t,
                        state.t,
                        generation.latents if state.x0 is None else state.x0,
                        sides[term.side],
                        others[term.side],
                    )
                    for term in method.query
                ]
                query += unit(sum(terms), salt)  # type: ignore[arg-type]
        phi, q = torch.stack(rows).double().numpy(), query.double().numpy()  # type: ignore[arg-type]
        inverse = np.eye(64)
        if method.damping is not None:
            ridge = method.damping * np.trace(phi @ phi.T) / min(phi.shape)
            inverse = np.linalg.inv(phi.T @ phi + ridge * np.eye(64))
        scores.append(phi @ inverse @ q * (np.array(losses) if method.residual else 1))
    return np.stack(scores)


@pytest.mark.parametrize("name", list(METHODS))
def test_scores_equal_a_dense_reference(tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    module = traced(
        tmp_path / "s", method, kind=ToyDiffusion if name in ON_UNET else QuickDiffusion
    )
    store = TraceStore(tmp_path / "s")
    result = Attributor(store, module, sampler=SAMPLER).attribute(RED, seed=4)
    expected = dense_scores(module, store, method, RED, seed=4)
    np.testing.assert_allclose(
        result.checkpoint_scores.numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )
    if name in ("tracin", "retrac"):
        joined = LEARNING_RATES[1] * expected[0] + LEARNING_RATES[2] * expected[1]
    else:
        joined = (expected / expected.std(axis=1, keepdims=True)).mean(0)
    np.testing.assert_allclose(
        result.scores.numpy(), joined, rtol=1e-3, atol=1e-3 * np.abs(joined).max()
    )
    assert result.steps == [1, 2]


def test_a_query_is_scored_again_with_another_damping(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["trak"])
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    query = attributor.query([RED, BAR], seeds=[4, 5])
    for damping in (0.1, None):
        method = replace(METHODS["trak"], damping=damping)
        afresh = Attributor(tmp_path / "s", module, sampler=SAMPLER, method=method).attribute(
            BAR, seed=5
        )
        again = attributor.score(query, damping=damping)[1]
        torch.testing.assert_close(
            again.checkpoint_scores, afresh.checkpoint_scores, rtol=1e-4, atol=1e-6
        )
        assert again.method == afresh.method
    assert torch.equal(
        attributor.score(query)[0].scores, attributor.attribute_many([RED, BAR], [4, 5])[0].scores
    )


def test_damping_by_agreement_is_where_the_checkpoints_agree_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = traced(tmp_path / "s", METHODS["trak"])
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    query = attributor.query([RED, BAR], seeds=[4, 5])
    found = attributor.score(query, damping="agreement")
    for i, chosen in enumerate(found):
        grid = {damping: attributor.score(query, damping=damping)[i] for damping in AGREEMENT_GRID}
        agreed = {d: np.corrcoef(each.checkpoint_scores.numpy())[0, 1] for d, each in grid.items()}
        assert chosen.damping == max(agreed, key=agreed.__getitem__)
        assert max(agreed.values()) > min(agreed.values()) + 1e-3
        torch.testing.assert_close(
            chosen.checkpoint_scores, grid[chosen.damping].checkpoint_scores, rtol=1e-6, atol=1e-9
        )
        assert chosen.method["damping"] == "agreement"
        assert grid[0.3].damping == 0.3
    monkeypatch.setattr(
        "ctrak_lightning.attribution.scoring.SCORES_AT_ONCE", 1
    )  # one query at a time
    one_by_one = attributor.score(query, damping="agreement")
    assert [each.damping for each in one_by_one] == [each.damping for each in found]
    torch.testing.assert_close(
        one_by_one[1].checkpoint_scores, found[1].checkpoint_scores, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["trak", "das", "retrac", "concept_trak"])
def test_top_is_the_top_of_all_scores(tmp_path: Path, name: str) -> None:
    module = traced(tmp_path / "s", METHODS[name], copies=3)
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    query = attributor.query([RED, BAR], seeds=[4, 5])
    for damping in ("method", 0.3, "agreement"):
        found = attributor.top(query, 5, damping=damping)
        for mine, full in zip(found, attributor.score(query, damping=damping), strict=True):
            expected = full.top(5)
            np.testing.assert_allclose(
                [record.score for record in mine], [record.score for record in expected], rtol=1e-4
            )
            # Copies of a sample tie up to rounding, so a rank is known by the sample's score.
            by_id = dict(zip(full.samples.sample_ids, full.scores.tolist(), strict=True))
            for rank, record in enumerate(mine, start=1):
                assert record.rank == rank
                assert record.score == pytest.approx(by_id[record.sample_id], rel=1e-4)
                where = full.samples.sample_ids.index(record.sample_id)
                assert record.metadata == full.samples.metadata_of(where)
    with pytest.raises(ValueError, match="expected at least 1"):
        attributor.top(query, 0)


def test_one_checkpoint_cannot_agree_and_says_so(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["trak"], steps=(1,))
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    query = attributor.query([RED], seeds=[4])
    with pytest.warns(UserWarning, match="the store has one: 10.0 is used.*HINT"):
        lone = attributor.score(query, damping="agreement")[0]
    assert lone.damping == 10
    assert torch.equal(lone.scores, attributor.score(query, damping=10.0)[0].scores)


def test_a_given_image_is_asked_about_like_a_generated_one(tmp_path: Path) -> None:
    """TRAK looks at noised images wherever they come from, so that giving it its own generated
    images changes nothing."""
    module = traced(tmp_path / "s", METHODS["trak"])
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    latents = attributor.generate([RED.present, BAR.present], [4, 5]).latents
    given = attributor.query_given([RED, BAR], latents)
    torch.testing.assert_close(given.features, attributor.query([RED, BAR], [4, 5]).features)
    assert attributor.score(given)[0].method == METHODS["trak"].to_dict()
    other = attributor.query_given([RED, BAR], latents.flip(0))
    assert not torch.allclose(other.features, given.features, rtol=0.1)
    with pytest.raises(
        ValueError, match=r"latents \[1, 3, 8, 8\].*\[3, 8, 8\] for each.*HINT: task.encode"
    ):
        attributor.query_given([RED, BAR], latents[:1])
    with pytest.raises(ConceptError, match="Known: red"):
        attributor.query_given([Concept("rad", {"colour": "rad"}, {})], latents[:1])


def test_a_given_image_may_be_noised(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["concept_trak"])
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    generation = attributor.generate([RED.present], [4])
    noising = replace(METHODS["concept_trak"], query_trajectory=Noised(timesteps=2))
    expected = Attributor(tmp_path / "s", module, sampler=SAMPLER, method=noising).attribute_many(
        [RED], generation=generation
    )[0]
    giving = Attributor(tmp_path / "s", module, sampler=SAMPLER, given="noised")
    found = giving.score(giving.query_given([RED], generation.latents))[0]
    torch.testing.assert_close(found.checkpoint_scores, expected.checkpoint_scores)
    assert found.method == expected.method
    assert found.image is not None
    along = attributor.attribute_many([RED], generation=generation)[0]
    assert not torch.allclose(along.scores, found.scores, rtol=0.1)


def test_a_global_query_is_the_mean_over_images_of_the_concept_alone(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["trak"])
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    alone = [Concept("red", {"colour": "red"}, {}), Concept("bar", {"shape": "bar"}, {})]
    expected = torch.stack(
        [
            torch.stack([attributor.query([c], seed).features[:, 0] for seed in (7, 8, 9)]).mean(0)
            for c in alone
        ],
        1,
    )
    found = attributor.query_global([RED, BAR], seed=7, images=3)
    torch.testing.assert_close(
        found.features, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    assert [c.name for c in found.concepts] == ["red", "bar"]
    again = attributor.query_global(
        [BAR, RED, BAR], seed=7, images=3
    )  # the second bar is the first, asked once
    assert torch.equal(again.features[:, 0], again.features[:, 2])
    torch.testing.assert_close(
        again.features[:, :2], found.features[:, [1, 0]], rtol=1e-4, atol=1e-6
    )
    assert [len(r.scores) for r in attributor.score(found)] == [12, 12]
    with pytest.raises(ConceptError, match="HINT: Concept.*alone="):
        attributor.query_global([Concept("red", "a red bar", "a bar")])
    with pytest.raises(ValueError, match="images=0"):
        attributor.query_global([RED], images=0)


def test_tracin_asks_for_the_learning_rates(tmp_path: Path) -> None:
    module = ToyDiffusion().double()
    loader = torch.utils.data.DataLoader(ToyData().toys, 5)
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=64))
    method = METHODS["tracin"]
    capture = Capture(
        str(tmp_path / "s"), module, module, loader, method=method, tracer=tracer, progress=False
    )
    capture.run(1, epoch=0)
    with pytest.raises(StoreMismatchError, match=r"no learning rate for steps \[1\].*HINT"):
        Attributor(tmp_path / "s", module, sampler=SAMPLER).attribute(RED)


def test_the_module_is_given_back_as_it_was(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["concept_trak_paper"])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    module.denoiser.conv_in.requires_grad_(False)
    module.train()
    module.denoiser.down_blocks[1].eval()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    flags = {name: value.requires_grad for name, value in module.named_parameters()}
    modes = {name: m.training for name, m in module.named_modules()}
    torch.manual_seed(9)
    state = torch.get_rng_state()
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    first = attributor.attribute(RED)
    with pytest.raises(ConceptError):
        attributor.attribute(Concept("x", {"colour": "puce"}, {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    assert flags == {name: value.requires_grad for name, value in module.named_parameters()}
    assert modes == {name: m.training for name, m in module.named_modules()}
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in module.parameters()
    )
    torch.testing.assert_close(
        attributor.attribute(RED).checkpoint_scores, first.checkpoint_scores, rtol=0, atol=0
    )


def test_many_concepts_at_once_and_any_batch_size_give_the_same_scores(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["concept_trak"])
    one = Attributor(tmp_path / "s", module, sampler=SAMPLER, batch_size=1)
    many = Attributor(tmp_path / "s", module, sampler=SAMPLER, batch_size=2)
    together = many.attribute_many([RED, BAR, RED], [0, 0, 5])
    for concept, seed, result in zip([RED, BAR, RED], [0, 0, 5], together, strict=True):
        alone = one.attribute(concept, seed)
        torch.testing.assert_close(
            result.checkpoint_scores, alone.checkpoint_scores, rtol=1e-3, atol=1e-5
        )
        assert result.image is not None
        torch.testing.assert_close(result.image, alone.image, rtol=1e-4, atol=1e-5)
    assert (together[0].image - together[2].image).abs().max() > 1e-3  # type: ignore[operator]
    generation = many.generate([RED.present] * 2, [0, 5])
    reused = many.attribute_many([RED, RED], [0, 5], generation=generation)
    torch.testing.assert_close(
        reused[1].checkpoint_scores, together[2].checkpoint_scores, rtol=1e-3, atol=1e-5
    )


def test_duplicate_samples_get_equal_scores(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["concept_trak_paper"], copies=2)
    scores = Attributor(tmp_path / "s", module, sampler=SAMPLER).attribute(RED).scores
    assert len(scores) == 24
    torch.testing.assert_close(scores[:12], scores[12:], rtol=1e-4, atol=1e-5)


def test_a_store_answers_another_method_with_the_same_traces(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["per_sample"])
    whole = Attributor(
        tmp_path / "s",
        module,
        method=replace(methods.d_trak(timesteps=2), normalisation="sample"),
        sampler=SAMPLER,
    )
    red, bar = whole.attribute_many([RED, BAR])
    torch.testing.assert_close(
        red.scores, bar.scores
    )  # a whole-image method does not see the concept
    red, bar = Attributor(tmp_path / "s", module, sampler=SAMPLER).attribute_many([RED, BAR])
    assert (red.scores - bar.scores).abs().max() > 0.1
    told = r"'trak'\): the store was traced by 'concept_trak_norm'.*(?:'sample'|SquaredNorm).*HINT"
    for method in (methods.trak(timesteps=2), "trak"):
        with pytest.raises(StoreMismatchError, match=told):
            Attributor(tmp_path / "s", module, method=method)
    with pytest.raises(ValueError, match="unknown method. Known: concept_trak"):
        Attributor(tmp_path / "s", module, method="tracks")


def test_a_store_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    module = ToyDiffusion()
    module.denoiser.conv_in.requires_grad_(False)
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=64))
    loader = torch.utils.data.DataLoader(ToyData().toys, 5)
    Capture(
        str(tmp_path / "s"),
        module,
        module,
        loader,
        method=METHODS["trak"],
        tracer=tracer,
        progress=False,
    ).run(1, epoch=0)
    Attributor(tmp_path / "s", module)
    with pytest.raises(StoreMismatchError, match=r"model\.frozen_weights.*HINT"):
        Attributor(tmp_path / "s", ToyDiffusion(seed=1))
    other = ToyDiffusion("v_prediction")
    other.load_state_dict(module.state_dict())
    with pytest.raises(StoreMismatchError, match=r"model\.noise_schedule"):
        Attributor(tmp_path / "s", other)
    module.denoiser.conv_out = torch.nn.Conv2d(8, 5, 3)
    with pytest.raises(StoreMismatchError, match=r"model\.trained_parameters"):
        Attributor(tmp_path / "s", module)


def test_a_module_that_carries_a_task_will_do(tmp_path: Path) -> None:
    module = traced(tmp_path / "s", METHODS["trak"])

    class Carrier(L.LightningModule):
        task = module

    direct = Attributor(tmp_path / "s", module, sampler=SAMPLER).attribute(RED)
    # The carrier's own parameters are none; the store's names are those of the carried module.
    with pytest.raises(StoreMismatchError, match="trained_parameters"):
        Attributor(tmp_path / "s", Carrier(), sampler=SAMPLER)
    with pytest.raises(
        TaskError, match="Linear is no DiffusionTask: it lacks denoiser, noise_schedule"
    ):
        Attributor(tmp_path / "s", torch.nn.Linear(1, 1))
    assert direct.scores.isfinite().all()


def test_unknown_attributes_list_the_known_ones(tmp_path: Path) -> None:
    attributor = Attributor(
        tmp_path / "s", traced(tmp_path / "s", METHODS["trak"]), sampler=SAMPLER
    )
    with pytest.raises(ConceptError, match=r"unknown attribute 'color'. Known: colour, shape"):
        attributor.attribute(Concept("x", {"color": "red"}, {}))
    with pytest.raises(ConceptError, match=r"unknown colour 'rod'. Known: red, blue, green"):
        attributor.attribute(Concept("x", {"colour": "rod"}, {}))
    with pytest.raises(ConceptError, match="takes attributes, not prompts"):
        attributor.attribute(Concept("x", "a red bar", "a bar"))
    with pytest.raises(ValueError, match="one seed for each"):
        attributor.attribute_many([RED, BAR], [1])
    with pytest.raises(ValueError, match="at least one concept"):
        attributor.attribute_many([])


def test_a_concept_the_model_has_not_learnt_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model that was traced hearing and asked deaf is another function, and would be refused for
    # that.
    monkeypatch.setattr(
        "ctrak_lightning.attribution.checkpoint_model.refuse_another_function", lambda *_: None
    )

    class Deaf(ToyDiffusion):
        scale = 0.0

        def tokens(self, colours: Any, shapes: Any) -> Tensor:
            rows = super().tokens(colours, shapes)
            return torch.cat([rows[:, :1] * self.scale, rows[:, 1:]], 1)

    module = Deaf().double()
    module.load_state_dict(traced(tmp_path / "s", METHODS["concept_trak_paper"]).state_dict())
    attributor = Attributor(tmp_path / "s", module, sampler=SAMPLER)
    with pytest.raises(GradientError, match=r"zero or not finite: \['red'\]"):
        attributor.attribute(RED)
    Deaf.scale = 1e-3
    with pytest.warns(UserWarning, match="hardly learnt.*HINT|red.*hardly learnt"):
        attributor.attribute(RED)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda facts: facts["method"].pop("query_trajectory"), "method"),
        (lambda facts: facts["method"]["training"]["objective"].update({"class": 7}), "method"),
        (lambda facts: facts["method"]["training"].update(normalisation="."), "method"),
        (lambda facts: facts["method"].update(query=[None]), "method"),
        (lambda facts: facts["projection"].update(projection="16"), "projection"),
        (lambda facts: facts["projection"]["projection"].update(rank="16; --"), "projection"),
    ],
)
def test_a_manifest_that_describes_nothing_known_is_told(
    tmp_path: Path, change: Any, what: str
) -> None:
    """An altered store, or one of a newer version."""
    module = traced(tmp_path / "s", METHODS["per_sample"], steps=(1,))
    manifest = tmp_path / "s" / "manifest.json"
    facts = json.loads(manifest.read_text())
    change(facts["header"])
    manifest.write_text(json.dumps(facts))
    with pytest.raises(CorruptStoreError, match=f"describes no {what} that is known here.*HINT"):
        Attributor(tmp_path / "s", module, sampler=SAMPLER).query([RED])


def test_an_interrupted_store_is_refused_with_the_way_on(tmp_path: Path) -> None:
    module = ToyDiffusion()
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=64))
    loader = torch.utils.data.DataLoader(ToyData().toys, 5)
    Capture(
        str(tmp_path / "s"),
        module,
        module,
        loader,
        method=METHODS["trak"],
        tracer=tracer,
        progress=False,
    )
    with pytest.raises(StoreError, match="interrupted.*HINT"):
        Attributor(tmp_path / "s", module)


def test_the_strength_is_the_mean_relative_size_of_the_concept_direction(tmp_path: Path) -> None:
    method = METHODS["concept_trak"]
    module = traced(tmp_path / "s", method)
    store = TraceStore(tmp_path / "s")
    attributor = Attributor(store, module, sampler=SAMPLER)
    generation = attributor.generate([RED.present], [4])
    assert isinstance(method.query_trajectory, Generated)
    ratios = []
    for checkpoint in store.checkpoints:
        module.load_state_dict(checkpoint.weights(), strict=False)
        for state in method.query_trajectory.select(generation, module.noise_schedule):
            with torch.no_grad():
                present, absent = (
                    module.predict(state.x_t, state.t, module.condition(spec, 1))
                    for spec in (RED.present, RED.absent)
                )
            ratios.append(float((present - absent).norm() / present.norm()))
    assert len(ratios) == 4
    assert attributor.attribute(RED, seed=4).strength == pytest.approx(sum(ratios) / 4, rel=1e-4)
