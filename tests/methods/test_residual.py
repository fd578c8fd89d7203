"""The residual's rows and queries against autograd on the loss and the loss difference, written out
for every parameterization."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ctrak_lightning import (
    Attributor,
    Capture,
    Concept,
    FlowSchedule,
    GradientTracer,
    Method,
    Projection,
    Sampler,
    TraceStore,
    methods,
)
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.exposures import UnknownExposuresWarning
from ctrak_lightning.capture.trace import trace_batch, trace_query
from ctrak_lightning.capture.trial import try_samples
from ctrak_lightning.errors import ConceptError, CorruptStoreError, MethodError
from ctrak_lightning.methods.objectives import (
    ConceptDirection,
    Denoising,
    Joint,
    RandomProbe,
    Residual,
    SquaredNorm,
    Term,
    contrast,
)
from ctrak_lightning.methods.trajectories import Noised, State
from ctrak_lightning.tasks import Encoded
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.rng import seeded_noise

from ..callbacks.test_concept_tracer import fit
from ..callbacks.test_inline import Dropping, trace_all
from ..toy import QuickDiffusion, ToyData, ToyDiffusion

KINDS = ("epsilon", "v_prediction", "sample", "flow")
EXACT = Projection(rank=100_000, dim=None)
STATES = Noised(timesteps=2, start=0.5, end=1.0)
PRESENT, ABSENT = {"colour": "red", "shape": "dot"}, {"shape": "dot"}


def model(kind: str) -> ToyDiffusion:
    module = ToyDiffusion("epsilon" if kind == "flow" else kind).double().eval()
    if kind == "flow":
        module.noise_schedule = FlowSchedule(shift=3.0)  # type: ignore[assignment]
    return module


def method_of(objective: Any) -> Method:
    return Method(
        name="residual",
        training=objective,
        training_trajectory=STATES,
        query=contrast(objective),
        query_trajectory=STATES,
        normalisation="none",
    )


def samples(module: ToyDiffusion) -> Encoded:
    torch.manual_seed(0)
    latents = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    specs = ({"colour": "red", "shape": "dot"}, {"colour": "blue", "shape": "bar"}, ABSENT)
    rows = [module.condition(spec, 1) for spec in specs]
    condition = {name: torch.cat([row[name] for row in rows]).double() for name in rows[0]}
    return Encoded(latents=latents, condition=condition, sample_ids=["a", "b", "c"])


class Loop:
    """Gradients of scalars, one sample at a time, by autograd alone."""

    def __init__(self, module: ToyDiffusion) -> None:
        self.module = module
        self.parameters = [p for p in module.denoiser.parameters() if p.requires_grad]

    def output(self, state: State, i: int, condition: dict[str, Tensor]) -> Tensor:
        return self.module.predict(state.x_t[i : i + 1], state.t[i : i + 1], condition)

    def target(self, kind: str, state: State, i: int, x0: Tensor) -> Tensor:
        """What the network should have said: from the definition of each parameterization."""
        a, s = self.module.noise_schedule.levels(state.t[i : i + 1], x0[i : i + 1])
        noise = (state.x_t[i : i + 1] - a * x0[i : i + 1]) / s
        clean = x0[i : i + 1]
        return {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": a * noise - s * clean,
            "flow": noise - clean,
        }[kind]

    def gradient(self, scalar: Tensor) -> Tensor:
        found = torch.autograd.grad(scalar, self.parameters, allow_unused=True)
        pairs = zip(found, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def trained(of: str, loop: Loop, kind: str, encoded: Encoded, states: list[State]) -> Tensor:
    """Summed gradients [B, P] of the training samples."""
    rows = []
    for i in range(len(encoded.latents)):
        own = {name: value[i : i + 1] for name, value in encoded.condition.items()}
        total = torch.zeros(())
        for state in states:
            target = loop.target(kind, state, i, encoded.latents)
            said = loop.output(state, i, own)
            before = loop.output(state, i, loop.module.condition({}, 1)).detach()
            if of in ("condition", "both"):
                total = total + (said - target).square().mean()
            if of in ("null", "both"):
                total = total + (2 * (before - target) * said).mean()
        rows.append(loop.gradient(total))
    return torch.stack(rows)


def wanted(of: str, loop: Loop, kind: str, x0: Tensor, states: list[State]) -> Tensor:
    """Summed gradients [B, P] of the queries: what the concept's name is worth to the loss."""
    rows = []
    for i in range(len(x0)):
        total = torch.zeros(())
        for state in states:
            target = loop.target(kind, state, i, x0)
            present = loop.output(state, i, loop.module.condition(PRESENT, 1))
            absent = loop.output(state, i, loop.module.condition(ABSENT, 1))
            residual = (absent - target).detach()
            if of in ("condition", "both"):
                total = total + (present - target).square().mean()
                total = total - (absent - target).square().mean()
            if of in ("null", "both"):
                total = total + (2 * residual * (present - absent)).mean()
        rows.append(loop.gradient(total))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_plain_gradients_of_the_loss(kind: str) -> None:
    module = model(kind)
    loop, encoded, tracer = Loop(module), samples(module), GradientTracer(module.denoiser, EXACT)
    x0 = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    sides: dict[Any, Any] = {
        "present": module.condition(PRESENT, 2),
        "absent": module.condition(ABSENT, 2),
    }
    for of in ("condition", "null", "both"):
        method = method_of(Residual(of))  # type: ignore[arg-type]
        rows = trace_batch(module, tracer, method, encoded, seed=0).features
        asked = list(STATES.states(module, x0, {}, ["", ""], 0))
        queries = trace_query(module, tracer, method, asked, x0, sides).features
        states = list(STATES.states(module, encoded.latents, {}, encoded.sample_ids, 0))
        ours = torch.cat([rows, queries]).double()
        theirs = torch.cat(
            [trained(of, loop, kind, encoded, states), wanted(of, loop, kind, x0, asked)]
        )
        # Unprojected features are an orthogonal map of the gradients: their products are the same.
        expected = theirs @ theirs.T
        assert expected.abs().min() > 0
        norms = expected.diag().sqrt()
        assert ((ours @ ours.T - expected).abs() <= 1e-5 * norms[:, None] * norms[None]).all(), of


def test_the_null_forward_pass_is_held_against_the_loop_at_the_trial() -> None:
    module = ToyDiffusion("sample").eval()
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=8))
    encoded = samples(module)
    encoded = replace(
        encoded,
        latents=encoded.latents.float(),
        condition={name: value.float() for name, value in encoded.condition.items()},
    )
    trial = try_samples(module, tracer, method_of(Residual("both")), encoded, 0, RowLimit())
    assert trial.blocks == trial.all_blocks
    asked: list[int] = []
    module.denoiser.register_forward_hook(lambda *_: asked.append(1))
    for of, passes in (("condition", 2), ("both", 4)):  # two states
        asked.clear()
        trace_batch(module, tracer, method_of(Residual(of)), encoded, 0)  # type: ignore[arg-type]
        assert len(asked) == passes


class WithoutNull(ToyDiffusion):
    """Conditional alone, as a class-conditional model that was never trained without a class."""

    def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
        if not spec:
            raise ConceptError("no label for no class")
        return super().condition(spec, n)


def test_a_model_without_a_null_condition_is_told_which_residual_it_can_have() -> None:
    module = WithoutNull("sample").double().eval()
    tracer, encoded = GradientTracer(module.denoiser, EXACT), samples(ToyDiffusion().double())
    with pytest.raises(
        MethodError, match=r"none \(ConceptError: no label for no class\).*influence\('condition'\)"
    ):
        trace_batch(module, tracer, methods.influence(), encoded, 0)
    assert trace_batch(module, tracer, methods.influence("condition"), encoded, 0).features.any()


def test_a_query_before_the_concept_is_held_against_the_absent_condition_on_both_sides() -> None:
    assert [term.reference_side for term in contrast(Residual("null"))] == ["absent", "absent"]
    assert [term.reference_side for term in contrast(ConceptDirection())] == ["absent", "present"]
    assert [term.reference_side for term in contrast(Denoising())] == [None, None]
    assert Term(Residual("null"), "absent", reference="present").reference_side == "present"


def test_a_term_that_names_its_reference_is_read_back() -> None:
    named = (Term(Residual("null"), "present", reference="present"),)
    method = replace(method_of(Residual("both")), query=named)
    assert Method.from_dict(method.to_dict()) == method
    plain = method_of(Residual())
    assert "reference" not in plain.to_dict()["query"][0]
    assert Method.from_dict(plain.to_dict()) == plain


def test_objectives_of_the_output_and_of_the_noise_prediction_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"Joint.*of the network's output.*noise prediction"):
        Joint(Residual(), SquaredNorm())
    joint = Joint(Residual(), Residual("null"))
    assert joint.of_output
    assert joint.needs_reference
    with pytest.raises(ValueError, match=r"Residual\(of='concept'\).*expected 'condition'"):
        Residual("concept")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_probe_weighs_every_element_of_the_output(kind: str) -> None:
    module = model(kind)
    loop, encoded, tracer = Loop(module), samples(module), GradientTracer(module.denoiser, EXACT)
    method = method_of(RandomProbe(seed=3))
    ours = trace_batch(module, tracer, method, encoded, seed=0).features.double()
    rows = []
    for i in range(3):
        own = {name: value[i : i + 1] for name, value in encoded.condition.items()}
        total = torch.zeros(())
        for state in STATES.states(module, encoded.latents, {}, encoded.sample_ids, 0):
            t = state.t[0].item()
            weights = seeded_noise((3, 8, 8), 3, t, "random probe").double()
            total = total + (weights * loop.output(state, i, own)[0]).mean()
        rows.append(loop.gradient(total))
    theirs = torch.stack(rows)
    expected = theirs @ theirs.T
    assert ((ours @ ours.T - expected).abs() <= 1e-5 * expected.diag().max()).all()


def capture_of(path: Path, module: ToyDiffusion, seed: int) -> Capture:
    return Capture(
        str(path),
        module,
        module,
        DataLoader(ToyData().toys, 5),
        method=replace(methods.influence("condition", 2), query=(Term(Residual()),)),
        tracer=GradientTracer(module.denoiser, Projection(rank=4, dim=64)),
        progress=False,
        seed=seed,
    )


def test_a_question_about_a_training_image_has_the_noise_of_its_trace(tmp_path: Path) -> None:
    """Asked as it was traced, a training image's question is its own row."""
    module = QuickDiffusion("sample").double()
    capture = capture_of(tmp_path, module, seed=7)
    capture.run(1, epoch=0)
    capture.writer.close()
    item = ToyData().toys[2]
    encoded = module.encode({k: v[None] if torch.is_tensor(v) else [v] for k, v in item.items()})
    spec = {"colour": item["colour"], "shape": item["shape"]}
    attributor = Attributor(tmp_path, module, sampler=Sampler(steps=4))
    query = attributor.query_given([Concept("all", spec, {})], encoded.latents)
    row = TraceStore(tmp_path).checkpoints[0].features()[2]
    assert row.norm() > 0
    assert (query.features[0, 0] - row).norm() <= 1e-4 * row.norm()
    told = "multiplies a sample's score by how often it was trained on.*HINT: let training batches"
    with pytest.warns(UnknownExposuresWarning, match=told):
        [result] = attributor.score(query)
    # What is said of the answer is how it was made.
    assert not result.method.get("per_exposure")
    assert attributor.method.per_exposure


def test_a_run_multiplies_scores_by_how_often_each_sample_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyData, "trace_dataloader", trace_all, raising=False)
    module = QuickDiffusion("sample")
    tracer = ConceptTracer(
        str(tmp_path), "influence", rank=4, dim=64, every_n_epochs=1, at_end=False
    )
    fit(module, [tracer], data=Dropping(), max_epochs=2)
    store = TraceStore(tmp_path)
    exposures = [checkpoint.exposures() for checkpoint in store.checkpoints]
    assert [None if each is None else each.unique().tolist() for each in exposures] == [
        [0, 1],
        [1, 2],
    ]
    alone = replace(methods.influence(), per_exposure=False)
    asked = [
        Attributor(tmp_path, module, method=m, sampler=Sampler(steps=4)) for m in (None, alone)
    ]
    query = asked[0].query([Concept("red", PRESENT, ABSENT)], 0)
    ours, plain = (each.score(query)[0].checkpoint_scores for each in asked)
    assert bool((plain != 0).any(1).all())
    for m, counts in enumerate(exposures):
        assert counts is not None
        torch.testing.assert_close(ours[m], plain[m] * counts)


def test_stores_from_before_seeds_were_recorded_go_on_and_damaged_ones_are_told(
    tmp_path: Path,
) -> None:
    module = QuickDiffusion("sample").double()
    capture = capture_of(tmp_path, module, seed=7)
    capture.run(1, epoch=0)
    capture.writer.close()
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    assert content["header"]["method"].pop("noise_seed") == 7
    path.write_text(json.dumps(content))
    capture = capture_of(tmp_path, module, seed=7)
    capture.run(2, epoch=1)
    capture.writer.close()
    store = TraceStore(tmp_path)
    assert [checkpoint.step for checkpoint in store.checkpoints] == [1, 2]
    assert "noise_seed" not in store.header.method
    content = json.loads(path.read_text())
    content["header"]["method"]["noise_seed"] = "seven"
    path.write_text(json.dumps(content))
    attributor = Attributor(tmp_path, module, sampler=Sampler(steps=4))
    with pytest.raises(CorruptStoreError, match="noise_seed 'seven'"):
        attributor.attribute(Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"}))


def test_v_prediction_at_a_state_without_signal_has_a_gradient() -> None:
    """Zero terminal SNR: the noise prediction is the state itself there, whatever the network says,
    and the output is not."""
    module = model("v_prediction")
    power = module.noise_schedule.alpha_bar.clone()
    power[-1] = 0
    module.noise_schedule = replace(module.noise_schedule, alpha_bar=power)
    tracer = GradientTracer(module.denoiser, EXACT)
    last = len(power) - 1
    state = State(torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.tensor([last]))
    sides: dict[Any, Any] = {
        "present": module.condition(PRESENT, 1),
        "absent": module.condition(ABSENT, 1),
    }
    x0 = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    norm: Callable[[Any], float] = lambda objective: float(  # noqa: E731
        trace_query(module, tracer, method_of(objective), [state], x0, sides).features.norm()
    )
    assert norm(Residual()) > 1e-6
    assert norm(Denoising()) == 0
    assert methods.trak().training == Denoising()
