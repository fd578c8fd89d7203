"""Each cotangent's ``J^T v`` against autograd on the published loss, written out as its paper has
it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ctrak_lightning import methods
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.capture.trial import try_samples
from ctrak_lightning.errors import MethodError, TrialError
from ctrak_lightning.gradients import GradientTracer, Projection
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    ConceptDirection,
    Denoising,
    MeanOutput,
    Objective,
    PosteriorSampling,
    Prediction,
    SquaredNorm,
    contrast,
)
from ctrak_lightning.utilities.memory import RowLimit
from ctrak_lightning.utilities.rng import seeded_noise

from ..toy import QuickDiffusion, ToyData, ToyDiffusion

KINDS = ("epsilon", "v_prediction", "sample")


class Setting:
    """A model of one prediction type, a state, and the network's answer there, in float64."""

    def __init__(self, kind: str) -> None:
        self.task = ToyDiffusion(kind).double().eval()
        torch.manual_seed(1)
        self.x0, self.noise = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
        self.t = torch.tensor([20, 70])
        self.present = self.task.condition({"colour": "red", "shape": "dot"}, 2)
        self.absent = self.task.condition({"shape": "dot"}, 2)
        self.x_t = self.task.noise_schedule.add_noise(self.x0, self.noise, self.t).requires_grad_()
        self.parameters = list(self.task.denoiser.parameters())

    def e(self, condition: dict[str, Tensor], x_t: Tensor | None = None) -> Tensor:
        x = self.x_t if x_t is None else x_t
        return self.task.noise_schedule.epsilon(self.task.predict(x, self.t, condition), x, self.t)

    def vjp(self, objective: Objective, side: str = "present") -> Tensor:
        condition = self.present if side == "present" else self.absent
        output = self.task.predict(self.x_t, self.t, condition)
        e = self.task.noise_schedule.epsilon(output, self.x_t, self.t)
        reference = self.e(self.absent).detach()
        prediction = Prediction(
            self.x_t, self.t, self.x0, output, e, reference, self.task.noise_schedule
        )
        v = objective.cotangent(prediction)
        assert not v.requires_grad
        assert v.shape == e.shape
        return self.flat(torch.autograd.grad(e, self.parameters, v, allow_unused=True))

    def loss_gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        return self.flat(torch.autograd.grad(loss(), self.parameters, allow_unused=True))

    def flat(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        pairs = zip(gradients, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def per_sample_mean(x: Tensor) -> Tensor:
    """The mean over a sample's elements, summed over the batch: what a loss per sample adds up
    to."""
    return x.flatten(1).mean(1).sum()


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_is_the_gradient_of_the_noise_prediction_loss(kind: str) -> None:
    s = Setting(kind)
    close(
        s.vjp(Denoising()),
        s.loss_gradient(lambda: per_sample_mean((s.e(s.present) - s.noise).square())),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_squared_norm_is_the_gradient_of_d_traks_output_function(kind: str) -> None:
    s = Setting(kind)
    close(s.vjp(SquaredNorm()), s.loss_gradient(lambda: per_sample_mean(s.e(s.present).square())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absolute", [False, True])
def test_mean_output_is_the_gradient_of_das_output_functions(kind: str, absolute: bool) -> None:
    s = Setting(kind)

    def output() -> Tensor:
        e = s.e(s.present)
        return per_sample_mean(e.abs() if absolute else e)

    close(s.vjp(MeanOutput(absolute)), s.loss_gradient(output))
    assert MeanOutput() == MeanOutput(absolute=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_probe_weighs_channels_alike_everywhere(kind: str) -> None:
    s = Setting(kind)
    found = s.vjp(ChannelProbe(seed=3))
    ones = torch.zeros_like(s.x_t)
    single = []
    for channel in range(s.x_t.shape[1]):
        ones.zero_()[:, channel] = 1
        only = ones.clone()
        single.append(s.loss_gradient(lambda only=only: per_sample_mean(s.e(s.present) * only)))  # type: ignore[misc]
    # one weight per channel explains the gradient wholly, and another seed's are others
    basis = torch.stack(single, 1).double()
    weights = torch.linalg.lstsq(basis, found.double()[:, None]).solution
    close((basis @ weights).squeeze(1).to(found), found)
    # standard normal ones, of the seed
    close(weights.flatten(), seeded_noise((s.x_t.shape[1],), 3, 0, "channel probe").to(weights))
    assert not torch.allclose(s.vjp(ChannelProbe(seed=4)), found, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_sampling_is_the_gradient_of_concept_traks_training_loss(kind: str) -> None:
    s = Setting(kind)

    def loss() -> Tensor:
        x_t = s.x_t.detach().requires_grad_()
        e = s.e(s.present, x_t)
        a, sigma = s.task.noise_schedule.levels(s.t, x_t)
        x0_hat = (x_t - sigma * e) / a  # Tweedie, from the noise prediction
        guide = torch.autograd.grad(
            per_sample_mean((x0_hat - s.x0).square()), x_t, retain_graph=True
        )[0]
        target = (e + guide).detach()
        return per_sample_mean((target - e).square())

    close(s.vjp(PosteriorSampling()), s.loss_gradient(loss))


@pytest.mark.parametrize("kind", KINDS)
def test_concept_direction_is_the_gradient_of_concept_traks_concept_loss(kind: str) -> None:
    s = Setting(kind)

    def loss() -> Tensor:
        e, without = s.e(s.present), s.e(s.absent)
        target = (e + (e - without)).detach()
        return per_sample_mean((target - e).square())

    close(s.vjp(ConceptDirection()), s.loss_gradient(loss))


def test_contrast_is_the_difference_of_the_two_conditions_gradients() -> None:
    s = Setting("epsilon")
    found = sum(term.weight * s.vjp(term.objective, term.side) for term in contrast(SquaredNorm()))
    assert isinstance(found, Tensor)

    def loss() -> Tensor:
        return per_sample_mean(s.e(s.present).square()) - per_sample_mean(s.e(s.absent).square())

    close(found, s.loss_gradient(loss))


def test_posterior_sampling_points_at_the_sample() -> None:
    """The sign convention: a step of theta against the gradient (a descent of the loss) brings
    x0_hat nearer to x0."""
    s = Setting("epsilon")
    gradient = s.vjp(PosteriorSampling())

    @torch.no_grad()
    def distance() -> float:
        a, sigma = s.task.noise_schedule.levels(s.t, s.x_t)
        x0_hat = (s.x_t - sigma * s.e(s.present)) / a
        return float(per_sample_mean((x0_hat - s.x0).square()))

    before = distance()
    step = 1e-4 * gradient / gradient.norm()
    with torch.no_grad():
        for parameter, change in zip(
            s.parameters, step.split([p.numel() for p in s.parameters]), strict=True
        ):
            parameter.sub_(change.view_as(parameter))
    assert distance() < before


def test_concept_direction_needs_the_other_condition() -> None:
    s = Setting("epsilon")
    output = s.task.predict(s.x_t, s.t, s.present)
    prediction = Prediction(s.x_t, s.t, s.x0, output, output, None, s.task.noise_schedule)
    with pytest.raises(ValueError, match="other condition"):
        ConceptDirection().cotangent(prediction)


@dataclass(frozen=True)
class Reconstruction(Objective):
    """``mean((x0_hat - x0)^2)``, differentiated with respect to the noise prediction."""

    way: str = "by hand"

    def cotangent(self, prediction: Prediction) -> Tensor:
        e, x0_hat = prediction.e, prediction.x0_hat
        if self.way == "by hand":  # as the message says
            a, s = prediction.schedule.levels(prediction.t, prediction.x_t)
            e = e.detach().requires_grad_()
            x0_hat = (prediction.x_t - s * e) / a
        loss = (x0_hat - prediction.x0).square().flatten(1).mean(1).sum()
        (v,) = torch.autograd.grad(loss, prediction.x_t if self.way == "of x_t" else e)
        return v


@pytest.mark.parametrize("way", ["directly", "of x_t"])
def test_a_derivative_that_there_is_not_is_refused_at_the_trial(way: str) -> None:
    module = QuickDiffusion("v_prediction")  # of a noise prediction, e is the output itself
    tracer = GradientTracer(module.denoiser, Projection(rank=4, dim=8))
    method = replace(
        methods.d_trak(timesteps=1),
        training=Reconstruction(way),
        query=contrast(Reconstruction(way)),
    )
    samples = module.encode(next(iter(ToyData().train_dataloader())))
    told = rf"Reconstruction\(way='{way}'\).cotangent\(\) takes a derivative.*HINT.*x0_hat = "
    with pytest.raises(TrialError, match=told):
        try_samples(module, tracer, method, samples, 0, RowLimit())
    with pytest.raises(MethodError, match=told):
        trace_batch(module, tracer, method, samples, 0)


def test_the_derivative_that_the_message_names_is_the_right_one() -> None:
    setting = Setting("epsilon")

    def loss() -> Tensor:
        output = setting.task.predict(setting.x_t, setting.t, setting.present)
        x0_hat = setting.task.noise_schedule.x0_hat(output, setting.x_t, setting.t)
        return (x0_hat - setting.x0).square().flatten(1).mean(1).sum()

    torch.testing.assert_close(setting.vjp(Reconstruction()), setting.loss_gradient(loss))
