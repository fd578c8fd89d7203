"""A kind of layer from outside the library, and what registering refuses."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ctrak_lightning import GradientTracer, Layer, register_layer
from ctrak_lightning.errors import ExtensionError, GradientError
from ctrak_lightning.gradients import Layout, UntracedParameterWarning, layers
from ctrak_lightning.gradients.kinds.linear import LinearLayer
from tests.gradients.zoo import SAMPLES, TOLERANCE, Case, features, randomized, row_error, weighted


class Gain(nn.Module):
    """Scales features, by a parameter with a name of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class GainLayer(Layer):
    """[1, n]."""

    names: ClassVar[tuple[str, ...]] = ("gain",)
    group: ClassVar[str] = "gains"

    def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
        super().__init__(name, module, own_names)
        self.rows, self.cols = 1, module.gain.numel()

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return gradients["gain"].unsqueeze(1)

    def event_dims(self, x: Tensor) -> int:
        return 1

    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        return x.flatten(0, -2)

    def contract(
        self, kept: Tensor, cotangent: Tensor, left: Tensor, right: Tensor, layout: Layout
    ) -> Tensor:
        products = layout.by_sample(kept * cotangent.reshape(kept.shape)).sum(1)  # [B, n]
        return (products @ right).unsqueeze(1) * left


class WrongLayer(GainLayer):
    def contract(self, kept: Tensor, cotangent: Tensor, *rest: Any) -> Tensor:
        return 2 * super().contract(kept, cotangent, *rest)


@pytest.fixture(autouse=True)
def _kinds() -> Iterator[None]:
    known = dict(layers._KINDS)
    yield
    layers._KINDS.clear()
    layers._KINDS.update(known)


def case() -> Case:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 6), Gain(6), nn.Tanh(), nn.Linear(6, 2))
    return Case(randomized(network), (torch.randn(SAMPLES, 3, 7),))


def test_a_kind_from_outside_is_traced_as_the_loop_traces_it() -> None:
    given = case()
    with pytest.warns(UntracedParameterWarning, match=r"1\.gain \(Gain is not a known layer kind"):
        GradientTracer(given.module)
    register_layer(Gain)(GainLayer)
    assert row_error(features(given), features(given, "loop")) < TOLERANCE
    assert GradientTracer(given.module).layer_groups()["gains"] == ["1"]

    class Derived(Gain):
        pass

    class Other(Gain):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain.square()

    assert layers.layer_kind(Derived(2)) is GainLayer
    assert layers.layer_kind(Other(2)) is None


def test_a_class_goes_before_the_one_that_it_inherits_from() -> None:
    class Low(nn.Linear):
        pass

    @register_layer(Low)
    class LowLayer(LinearLayer):
        pass

    assert layers.layer_kind(Low(2, 2)) is LowLayer
    assert layers.layer_kind(nn.Linear(2, 2)) is LinearLayer
    register_layer(Low)(LowLayer)


def test_a_wrong_formula_is_refused_by_the_comparison_with_the_loop() -> None:
    register_layer("tests.gradients.test_kinds_of_layers.Gain")(WrongLayer)
    given = case()
    with pytest.raises(GradientError, match=r"differ from the per-sample ones in 1 layers: 1 \(1"):
        GradientTracer(given.module).check(given.forward, [weighted], SAMPLES)


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_a_matrix_without_every_gradient_is_refused(factor: float) -> None:
    """Its contraction agrees with it, and the loop reads gradients through it."""

    @register_layer(Gain)
    class Scaled(WrongLayer):
        def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
            return factor * super().matrix(gradients)

    given = case()
    with pytest.raises(
        GradientError, match=r"Scaled\.matrix, of layer '1': .*HINT: the matrix has"
    ):
        GradientTracer(given.module).check(given.forward, [weighted], SAMPLES)


FAULT = RuntimeError("expected input to have 9 channels")


def broken(member: str, returned: Any) -> type[Layer]:
    """A kind of gains one member of which raises, or returns, this."""

    def instead(self: Any, *args: Any) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    return type("Broken", (GainLayer,), {member: instead, "__module__": "mine"})


@pytest.mark.parametrize("member", ["__init__", "event_dims", "keep", "contract", "matrix"])
def test_what_a_kind_raises_is_told_with_its_place_and_the_layer(member: str) -> None:
    register_layer(Gain)(broken(member, FAULT))
    given = case()
    where = (
        r"^mine\.Broken\('1', Gain, \['gain'\]\)"
        if member == "__init__"
        else rf"^mine\.Broken\.{member}, of layer '1',"
    )
    with pytest.raises(
        ExtensionError, match=rf"{where} raised RuntimeError: expected input to have 9.* HINT"
    ) as found:
        GradientTracer(given.module).check(given.forward, [weighted], SAMPLES)
    assert found.value.__cause__ is FAULT


@pytest.mark.parametrize(
    ("member", "returned", "told"),
    [
        ("keep", None, rf"returned NoneType, expected a tensor \[{3 * SAMPLES}, \.\.\.\]"),
        ("keep", torch.ones(2, 6), rf"returned shape \[2, 6\], expected a tensor \[{3 * SAMPLES}"),
        ("contract", (torch.ones(1),), rf"returned tuple, expected a tensor \[{SAMPLES}, 1, 6\]"),
        ("contract", torch.ones(SAMPLES, 6), rf"shape \[{SAMPLES}, 6\], expected a tensor"),
        ("matrix", torch.ones(1, 6), r"returned shape \[1, 6\], expected a tensor \[1, 1, 6\]"),
    ],
)
def test_what_a_kind_returns_must_have_its_shape(member: str, returned: Any, told: str) -> None:
    register_layer(Gain)(broken(member, returned))
    given = case()
    with pytest.raises(
        ExtensionError, match=rf"^mine\.Broken\.{member}, of layer '1', .*{told}.*HINT"
    ):
        GradientTracer(given.module).check(given.forward, [weighted], SAMPLES)


def test_a_kind_says_the_size_of_its_matrix() -> None:
    @register_layer(Gain)
    class Sizeless(GainLayer):
        def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
            Layer.__init__(self, name, module, own_names)

    with pytest.raises(ExtensionError, match=r"Sizeless\('1', .*no rows and cols.*HINT"):
        GradientTracer(case().module)


def test_memory_that_runs_out_in_a_kind_is_no_error_of_the_kind() -> None:
    register_layer(Gain)(broken("keep", MemoryError("not enough memory")))
    given = case()
    with pytest.raises(MemoryError):
        GradientTracer(given.module).check(given.forward, [weighted], SAMPLES)


def test_a_layer_of_several_tensors_is_refused_by_name() -> None:
    class Pair(Gain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair(7)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0]  # type: ignore[no-any-return]

    register_layer(Pair)(GainLayer)
    given = Case(First(), (torch.randn(SAMPLES, 3, 7),))
    with pytest.raises(GradientError, match=r"'pair' \(Pair, traced by .*GainLayer.*tuple.*HINT"):
        features(given)
    recorder = GradientTracer(given.module).step_recorder()
    recorder.attach()
    recorder.begin(SAMPLES)
    loss = given.module(*given.inputs).sum()  # the training step itself goes on
    with pytest.raises(GradientError, match="'pair'"):
        recorder.before_backward(loss)
    recorder.detach()


def test_what_cannot_be_registered() -> None:
    class Half(Layer):
        def event_dims(self, x: Tensor) -> int:
            return 1

    class Sizeless(Half):
        matrix, keep, contract = GainLayer.matrix, GainLayer.keep, GainLayer.contract

    class Letters(GainLayer):
        names = "gain"  # type: ignore[assignment]

    class Groupless(GainLayer):
        group = None  # type: ignore[assignment]

    class Bare(GainLayer):
        def __init__(self, module: Any) -> None:
            super().__init__("", module, ["gain"])

    for modules, kind, message in (
        ((Gain,), Sizeless, r"Sizeless: nothing sets `rows` and `cols`.*HINT"),
        ((Gain,), Letters, r"Letters: names='gain', expected .*texts\. HINT"),
        ((Gain,), Groupless, r"Groupless: group=None, expected a text\. HINT"),
        ((Gain,), Bare, r"Bare: it is not made of \(name, module, own_names\).*HINT"),
        ((), GainLayer, r"register_layer\(\): expected the classes of modules.*HINT"),
        (("",), GainLayer, r"register_layer\(''\): expected a subclass of nn\.Module.*HINT"),
        (("Gain",), GainLayer, r"register_layer\('Gain'\): expected .*'package\.module\.Class'"),
        ((Gain(2),), GainLayer, r"register_layer\(Gain\(\)\): expected a subclass of nn"),
        ((nn.Linear,), GainLayer, r"Linear\): LinearLayer traces it already\. HINT"),
        ((Gain,), Half, r"Gain\): Half lacks contract, keep, matrix"),
        ((Gain,), Gain, r"expected a subclass of ctrak_lightning\.Layer"),
        ((Gain, Tensor), GainLayer, r"register_layer\(<class 'torch\.Tensor'>\): expected a sub"),
    ):
        with pytest.raises(GradientError, match=message):
            register_layer(*modules)(kind)  # type: ignore[arg-type, type-var]
    assert layers.layer_kind(Gain(2)) is None


def test_transposed_convolutions_take_an_image_without_a_batch() -> None:
    """As torch does; such a row belongs to no sample of several, and to the one of a single."""
    torch.manual_seed(0)
    network = randomized(nn.ConvTranspose1d(3, 4, 3, stride=2))
    given = Case(network, (torch.randn(1, 3, 5),), lambda m, x: m(x[0])[None])
    assert row_error(features(given), features(given, "loop")) < TOLERANCE
