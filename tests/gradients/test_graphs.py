"""Graphs that are hard to hook: checkpointing, in-place operations, leaves, autocast, cotangents
that differentiate."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients import GradientTracer
from ctrak_lightning.gradients.kinds.convolution import ConvLayer
from ctrak_lightning.gradients.kinds.linear import LinearLayer
from tests.gradients.zoo import (
    PROJECTION,
    SAMPLES,
    TOLERANCE,
    Case,
    build,
    features,
    frozen,
    row_error,
    weighted,
)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, x_requires_grad: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.reentrant, self.x_requires_grad = reentrant, x_requires_grad

    def forward(self, x: Tensor) -> Tensor:
        if self.x_requires_grad:
            x = x.detach().requires_grad_()
        return (
            checkpoint(
                lambda x: self.second(self.first(x).tanh()).relu_(), x, use_reentrant=self.reentrant
            )
            + x
        )


class InPlace(nn.Module):
    """Overwrites the outputs of traced layers, among them Linear's, which are views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.last = nn.Conv2d(2, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv(x)).flatten(2).mT
        before = self.linear(h)
        fork = before * 2
        before += 1
        before[..., :2].mul_(2)
        return self.last(self.relu(before) + fork).mul_(3)


@pytest.mark.parametrize("name", ["unet", "conditional_unet", "lora_unet", "dit"])
def test_gradient_checkpointing(name: str) -> None:
    case = build(name)
    expected = features(case, "loop")
    case.module.enable_gradient_checkpointing()  # type: ignore[operator]
    for cotangents in ([weighted], [weighted, weighted]):
        assert row_error(features(case, cotangents=cotangents), expected) < TOLERANCE
    assert row_error(features(case, "loop"), expected) < TOLERANCE


@pytest.mark.parametrize("trainable", ["first.weight", "second.bias"])
def test_checkpointing_with_layers_frozen_after_the_tracer_was_made(trainable: str) -> None:
    torch.manual_seed(0)
    case = frozen(Case(Checkpointed(False), (torch.randn(SAMPLES, 3, 5),)), trainable)
    expected = features(case, "loop")
    tracers = [
        GradientTracer(case.module, PROJECTION, engine=engine)
        for engine in ("hooks", "loop", "functional")
    ]
    case.module.requires_grad_(False)
    for tracer in tracers[:2]:
        first, second = tracer.vjps(case.forward, [weighted, weighted], SAMPLES)
        assert row_error(first, expected) < TOLERANCE
        assert torch.equal(first, second)
    assert not any(parameter.requires_grad for parameter in case.module.parameters())


def test_layers_frozen_after_the_tracer_was_made() -> None:
    case = build("lora_unet")
    expected = features(case, "loop")
    tracers = [
        GradientTracer(case.module, PROJECTION, engine=engine)
        for engine in ("hooks", "loop", "functional")
    ]
    case.module.requires_grad_(False)
    for tracer in tracers:
        assert row_error(tracer.vjps(case.forward, [weighted], SAMPLES)[0], expected) < TOLERANCE


def test_recomputation_inside_the_forward_pass_adds_nothing() -> None:
    case = Case(Checkpointed(False), (torch.randn(SAMPLES, 3, 5),))

    def forward(rows: Tensor) -> Tensor:
        x = case.inputs[0][rows].clone().requires_grad_()
        e = case.module(x)
        return e + torch.autograd.grad(e.sum(), x, retain_graph=True)[0]

    tracer = GradientTracer(case.module, PROJECTION)
    loop = GradientTracer(case.module, PROJECTION, engine="loop")
    constant = [lambda e, rows: torch.ones_like(e)]
    assert (
        row_error(
            tracer.vjps(forward, constant, SAMPLES)[0], loop.vjps(forward, constant, SAMPLES)[0]
        )
        < TOLERANCE
    )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("x_requires_grad", [False, True])
def test_reentrant_checkpointing_is_refused(x_requires_grad: bool) -> None:
    case = Case(Checkpointed(True, x_requires_grad), (torch.randn(SAMPLES, 3, 5),))
    with pytest.raises(GradientError, match="reentrant"):
        features(case)
    with pytest.raises(GradientError, match="reentrant"):
        features(case, "loop")
    assert all(parameter.grad is None for parameter in case.module.parameters())


def test_reentrant_checkpointing_beside_the_layers_is_refused_too() -> None:
    class Around(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(checkpoint(torch.tanh, self.first(x), use_reentrant=True))
            return found

    with pytest.raises(GradientError, match="reentrant checkpointing.*use_reentrant=False"):
        features(Case(Around(True), (torch.randn(SAMPLES, 3, 5),)))


def test_operations_in_place() -> None:
    torch.manual_seed(0)
    case = Case(InPlace(), (torch.randn(SAMPLES, 2, 5, 5),))
    expected = features(case, "loop")
    assert row_error(features(case), expected) < TOLERANCE
    tracer = GradientTracer(case.module, PROJECTION)
    case.module.requires_grad_(False)
    assert row_error(tracer.vjps(case.forward, [weighted], SAMPLES)[0], expected) < TOLERANCE


def test_an_input_overwritten_after_its_norm_is_refused() -> None:
    norm = nn.LayerNorm(4)
    x = torch.randn(SAMPLES, 4)

    def forward(rows: Tensor) -> Tensor:
        h = x[rows].clone()
        e = norm(h)
        h.zero_()
        return e

    tracer = GradientTracer(norm, PROJECTION)
    norm.requires_grad_(False)  # autograd itself no longer keeps, and watches, the input
    with pytest.raises(GradientError, match=r"input of layer ''.*overwritten in place.*HINT"):
        tracer.vjps(forward, [weighted], SAMPLES)


def test_inputs_that_require_gradients_change_nothing() -> None:
    case = build("conditional_unet")
    expected = features(case)
    for value in (case.inputs[0], case.inputs[2]):
        value.requires_grad_()
    assert row_error(features(case), expected) < TOLERANCE
    assert case.inputs[0].grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cotangent_that_differentiates(checkpointing: bool) -> None:
    case = build("conditional_unet")
    if checkpointing:
        case.module.enable_gradient_checkpointing()  # type: ignore[operator]
    x, t, c = case.inputs
    x0 = torch.randn_like(x)
    seen: dict[str, Tensor] = {}

    def forward(rows: Tensor) -> Tensor:
        seen["x_t"] = x[rows].clone().requires_grad_()
        return case.call(case.module, seen["x_t"], t[rows], c[rows])

    def posterior(e: Tensor, rows: Tensor) -> Tensor:
        x0_hat = (seen["x_t"] - 0.6 * e) / 0.8
        loss = (x0_hat - x0[rows]).square().flatten(1).mean(1).sum()
        return -2 * torch.autograd.grad(loss, seen["x_t"], retain_graph=True)[0] / e[0].numel()

    hooks = GradientTracer(case.module, PROJECTION).vjps(
        forward, [posterior, weighted, posterior], SAMPLES
    )
    loop = GradientTracer(case.module, PROJECTION, engine="loop").vjps(
        forward, [posterior, weighted], SAMPLES
    )
    for ours, theirs in zip(hooks, loop, strict=False):
        assert row_error(ours, theirs) < TOLERANCE
    assert torch.equal(hooks[0], hooks[2])


def test_cotangent_that_calls_the_network_again_adds_nothing() -> None:
    case = build("conditional_unet")
    x, t, c = case.inputs

    def contrast(e: Tensor, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            return e - case.call(case.module, x[rows], t[rows], 0 * c[rows])

    ours = features(case, cotangents=[contrast])
    assert row_error(ours, features(case, "loop", cotangents=[contrast])) < TOLERANCE


def test_cotangent_that_frees_the_graph_is_explained() -> None:
    case = build("linear_2d")

    def greedy(e: Tensor, rows: Tensor) -> Tensor:
        torch.autograd.grad(e.square().sum(), list(case.module.parameters()))
        return e

    with pytest.raises(GradientError, match=r"retain_graph=True"):
        features(case, cotangents=[greedy])


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside: bool) -> None:
    case = build("conditional_unet")
    exact = features(case)
    for engine in ("hooks", "loop"):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            inside = Case(
                case.module, case.inputs, _autocast(case.call) if not outside else case.call
            )
            ours = features(inside, engine)
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours, exact).min() > 0.99


def test_half_precision_parameters() -> None:
    case = build("conditional_unet")
    exact = features(case)
    x, t, c = case.inputs
    ours = features(Case(case.module.bfloat16(), (x.bfloat16(), t, c.bfloat16()), case.call))
    assert ours.dtype == torch.float32
    assert torch.cosine_similarity(ours, exact).min() > 0.98


def test_a_layer_without_graph_is_refused() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = first(x)
        return second(h)

    case = Case(nn.ModuleDict({"first": first, "second": second}), (torch.randn(SAMPLES, 4),), call)
    with pytest.raises(GradientError, match=r"without a graph.*\['first'\].*HINT"):
        features(case)


def test_a_second_call_without_graph_adds_nothing() -> None:
    layer = nn.Linear(4, 4)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = layer(x)
        return layer(x + h)

    case = Case(layer, (torch.randn(SAMPLES, 4),), call)
    assert row_error(features(case), features(case, "loop")) < TOLERANCE


def test_hooks_of_others_and_keyword_calls() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    first.register_forward_pre_hook(lambda module, args: (args[0].cos(),))
    first.register_forward_hook(lambda module, args, output: 2 * output.tanh())
    case = Case(
        nn.Sequential(first, second),
        (torch.randn(SAMPLES, 4),),
        lambda m, x: second(input=first(x)),
    )
    assert row_error(features(case), features(case, "loop")) < TOLERANCE


def test_what_is_kept_of_an_input_is_its_projection() -> None:
    conv, linear = nn.Conv2d(8, 5, 3, padding=1), nn.Linear(8, 5)
    projection = torch.randn(8 * 9 + 1, 4), torch.randn(9, 4)
    x = torch.randn(SAMPLES, 8, 7, 7)
    kept = ConvLayer("conv", conv, ["weight", "bias"]).keep(x, conv(x), projection[0])
    assert kept.numel() == SAMPLES * 4 * 7 * 7
    x = torch.randn(SAMPLES, 3, 8)
    kept = LinearLayer("linear", linear, ["weight", "bias"]).keep(x, linear(x), projection[1])
    assert kept.numel() == SAMPLES * 4 * 3


def test_an_unused_layer_contributes_nothing() -> None:
    used, unused = nn.Linear(4, 4), nn.Linear(4, 4)
    module = nn.ModuleDict({"a": used, "b": unused})
    case = Case(module, (torch.randn(SAMPLES, 4),), lambda m, x: used(x) + 0 * unused(x).detach())
    ours = features(case)
    assert torch.equal(ours[:, 16:], torch.zeros(SAMPLES, 16))
    assert row_error(ours, features(case, "loop")) < TOLERANCE


def test_a_weight_used_without_its_layer_is_refused() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(SAMPLES, 4)
    for call in (lambda m, x: x @ m.weight, lambda m, x: m(x) @ m.weight):
        case = Case(layer, (x,), call)
        with pytest.raises(GradientError, match=r"'weight' enters the output \d times.*HINT"):
            features(case)
        assert features(case, "loop").shape == (SAMPLES, 16)


def _autocast(call: object) -> object:
    def inner(module: nn.Module, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(module, *inputs)  # type: ignore[operator]

    return inner


def test_weights_that_are_not_the_modules_own_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, own = torch.randn(2, 3), dict(module.named_parameters())
    tracer = GradientTracer(module, PROJECTION)

    def traced(weights: dict[str, Tensor]) -> Tensor:
        def forward(rows: Tensor) -> Tensor:
            return torch.func.functional_call(module, weights, (x[rows],))  # type: ignore[no-any-return]

        return tracer.vjps(forward, [lambda e, rows: e], 2)[0]

    expected = tracer.vjps(lambda rows: module(x[rows]), [lambda e, rows: e], 2)[0]
    assert torch.equal(traced(own), expected)
    for other in (own["2.bias"].detach().clone().requires_grad_(), own["2.bias"].detach() * 2):
        with pytest.raises(
            GradientError, match=r"other weights than their own: \['2'\].*HINT.*functional_call"
        ):
            traced(own | {"2.bias": other})
