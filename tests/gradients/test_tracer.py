"""GradientTracer: what it selects and names, what it warns of, and what it refuses."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients import (
    GradientTracer,
    Projection,
    SlowParameterWarning,
    UntracedParameterWarning,
)
from ctrak_lightning.gradients.layouts import _groups
from tests.gradients.zoo import (
    LARGE,
    PROJECTION,
    SAMPLES,
    TOLERANCE,
    Case,
    build,
    features,
    randomized,
    row_error,
    weighted,
)


class OwnConv(nn.ConvTranspose1d):
    """Computes in its own way."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x.tanh(), output_size)


class Mixed(nn.Module):
    """A known layer beside a bare parameter, an unknown layer and shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.up = OwnConv(4, 3, 2)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.embed(x).tanh()) * self.scale
        return self.last(self.up(h.mT))


def mixed() -> Case:
    torch.manual_seed(0)
    return Case(randomized(Mixed()), (torch.randn(SAMPLES, 4, 4),))


def test_untraced_parameters_are_named_once() -> None:
    case = mixed()
    with pytest.warns(UntracedParameterWarning) as caught:
        tracer = GradientTracer(case.module, PROJECTION)
    message = str(caught.pop().message)
    assert not caught.list
    for part in (
        "scale (",
        "up.weight (OwnConv",
        "up.bias (",
        "embed.weight (shared as embed.weight, head.weight)",
    ):
        assert part in message
    assert tracer.block_names == ["head", "last"]
    assert tracer.parameter_names == ["head.bias", "last.bias", "last.weight"]
    loop = GradientTracer(case.module, PROJECTION, engine="loop")
    assert loop.block_names == ["embed.weight", "head", "last", "scale", "up.bias", "up.weight"]
    [ours] = tracer.vjps(case.forward, [weighted], SAMPLES)
    [theirs] = loop.vjps(case.forward, [weighted], SAMPLES)
    sizes = [4, 4, 2 * 4, 4, 3, 4]
    parts = dict(zip(loop.block_names, theirs.split(sizes, dim=1), strict=True))
    assert row_error(ours, torch.cat([parts["head"], parts["last"]], dim=1)) < TOLERANCE


def test_reference_engines_trace_bare_and_shared_parameters() -> None:
    case = mixed()
    loop = features(case, "loop")
    assert row_error(features(case, "functional"), loop) < TOLERANCE
    exact = features(case, "loop", Projection(rank=1000, dim=None))
    case.module.zero_grad()
    (
        case.forward(torch.tensor([1]))
        * weighted(case.forward(torch.tensor([1])), torch.tensor([1]))
    ).sum().backward()
    squares = sum(
        float(p.grad.square().sum()) for p in case.module.parameters() if p.grad is not None
    )
    assert exact[1].square().sum().item() == pytest.approx(squares, rel=1e-5)


def test_auto_traces_what_has_no_hook_by_the_loop_and_names_it() -> None:
    case = mixed()
    with pytest.warns(SlowParameterWarning, match="a pass per sample.*HINT") as caught:
        tracer = GradientTracer(case.module, PROJECTION, engine="auto")
    message = str(caught[0].message)
    for part in (
        "scale (",
        "up.weight (OwnConv",
        "embed.weight (shared as embed.weight, head.weight)",
    ):
        assert part in message
    assert "last" not in message
    cotangents = [weighted, lambda e, rows: e.detach().sign()]
    loop = GradientTracer(case.module, PROJECTION, engine="loop")
    for ours, theirs in zip(
        tracer.vjps(case.forward, cotangents, SAMPLES),
        loop.vjps(case.forward, cotangents, SAMPLES),
        strict=True,
    ):
        assert row_error(ours, theirs) < TOLERANCE
    assert tracer.describe() == loop.describe()
    assert tracer.describe()["parameters_without_hook"] == 4
    plain = build("linear_2d").module
    described = GradientTracer(plain, PROJECTION, engine="auto").describe()
    assert described == GradientTracer(plain, PROJECTION).describe()
    with pytest.raises(GradientError, match='step_recorder.*engine "hooks"'):
        tracer.step_recorder()


def test_auto_allows_states_that_do_not_reach_the_parameters_without_hook() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    case = Case(Optional(), (torch.randn(SAMPLES, 4),))
    with pytest.warns(SlowParameterWarning, match="scale"):
        ours = features(case, "auto")
    assert row_error(ours, features(case, "loop")) < TOLERANCE
    bare = Case(nn.ParameterList([torch.ones(4)]), case.inputs, lambda m, x: x * m[0])
    with pytest.warns(SlowParameterWarning):
        ours = features(bare, "auto")
    assert row_error(ours, features(bare, "loop")) < TOLERANCE


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embedding_options_are_not_traced(option: dict[str, Any]) -> None:
    module = nn.Sequential(nn.Embedding(5, 4, **option), nn.Linear(4, 4))
    with pytest.warns(
        UntracedParameterWarning, match=rf"0\.weight \(nn\.Embedding\({next(iter(option))}"
    ):
        assert GradientTracer(module, PROJECTION).block_names == ["1"]
    with pytest.raises(GradientError, match="none of the trainable parameters can be traced"):
        GradientTracer(module[0], PROJECTION)


def test_layers_with_a_forward_of_their_own_are_not_traced() -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight.sum()

    with pytest.raises(GradientError, match="Other is not a known layer kind"):
        GradientTracer(Other(3, 3))
    scaled = nn.Linear(3, 3)
    scaled.forward = lambda x: nn.functional.linear(x, 3 * scaled.weight)  # type: ignore[method-assign]
    with pytest.raises(
        GradientError, match="Linear with a `forward` of its own is not a known layer kind"
    ):
        GradientTracer(scaled)

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    with pytest.raises(GradientError, match="Standardised is not a known layer kind"):
        GradientTracer(Standardised(3, 3, 1))


def test_attention_of_torch_is_not_traced() -> None:
    module = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    with pytest.warns(
        UntracedParameterWarning,
        match=r"0\.self_attn\.out_proj\.weight \(used inside nn\.MultiheadAttention",
    ):
        tracer = GradientTracer(module, PROJECTION)
    assert tracer.block_names == ["0.linear1", "0.linear2", "0.norm1", "0.norm2"]
    x = torch.randn(SAMPLES, 3, 4)
    [ours] = tracer.vjps(lambda rows: module(x[rows]), [weighted], SAMPLES)
    loop = GradientTracer(module, PROJECTION, engine="loop", layers=["*linear*", "*norm*"])
    assert (
        row_error(ours, loop.vjps(lambda rows: module(x[rows]), [weighted], SAMPLES)[0]) < TOLERANCE
    )


def test_parametrized_weights_are_not_traced() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.warns(UntracedParameterWarning, match=r"parametrizations\.weight\.original0"):
        tracer = GradientTracer(module, PROJECTION)
    assert tracer.parameter_names == ["bias"]


def test_patterns_select_layers() -> None:
    case = build("conditional_unet")
    tracer = GradientTracer(case.module, PROJECTION, layers=["*attn2*", "conv_in"])
    assert all("attn2" in name or name == "conv_in" for name in tracer.block_names)
    assert "conv_in" in tracer.block_names
    assert len(tracer.block_names) == 17
    assert (
        row_error(
            tracer.vjps(case.forward, [weighted], SAMPLES)[0],
            features(case, "loop", layers=["*attn2*", "conv_in"]),
        )
        < TOLERANCE
    )


def test_lora_traces_the_adapter_alone() -> None:
    tracer = GradientTracer(build("lora_unet").module, PROJECTION)
    assert len(tracer.block_names) == 4 * 2 * 4 * 2
    assert all(
        ".lora_A.default" in name or ".lora_B.default" in name for name in tracer.block_names
    )


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    module = build("conditional_unet").module
    with pytest.raises(
        GradientError, match=r"'\*attn3\*' matches no module.*'conv_in'.*and \d+ more.*HINT"
    ):
        GradientTracer(module, layers=["*attn2*", "*attn3*"])


def test_nothing_to_trace_is_refused() -> None:
    with pytest.raises(
        GradientError, match=r"no parameter requires a gradient.*'weight', 'bias'.*HINT"
    ):
        GradientTracer(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(GradientError, match="It has: none"):
        GradientTracer(nn.ReLU())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "unet"}, "module=str"),
        ({"engine": "fast"}, "engine='fast'"),
        ({"layers": "*attn*"}, r"layers='\*attn\*'"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GradientError, match=rf"{message}.*expected.*HINT"):
        GradientTracer(**{"module": nn.Linear(2, 2), **options})


def test_description() -> None:
    module = build("unet").module
    tracer = GradientTracer(module, Projection(rank=3, dim=32), layers=["*conv*"])
    facts = json.loads(json.dumps(tracer.describe()))
    assert (
        facts
        == GradientTracer(
            module, Projection(rank=3, dim=32), layers=["*conv*"], engine="loop"
        ).describe()
    )
    assert facts["projection"] == {"rank": 3, "dim": 32, "seed": 0}
    assert facts["layers"] == ["*conv*"]
    assert facts["dim"] == tracer.dim == 32
    others = [
        GradientTracer(module, tracer.projection),
        GradientTracer(nn.Linear(2, 3)),
        GradientTracer(nn.Linear(3, 2)),
    ]
    assert (
        len(
            {
                facts["parameters_sha256"],
                *(other.describe()["parameters_sha256"] for other in others),
            }
        )
        == 4
    )


def test_dim_without_sketch() -> None:
    module = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 2, bias=False))
    tracer = GradientTracer(module, Projection(rank=4, dim=None))
    assert tracer.dim == 16 + 4 + 8
    x = torch.randn(3, 9)
    assert tracer.vjps(lambda rows: module(x[rows]), [weighted], 3)[0].shape == (3, 28)


@pytest.mark.parametrize("engine", ["hooks", "loop", "functional"])
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: (m(x),), "returned tuple"),
        (lambda m, x: m(x).long(), "returned torch.int64"),
        (lambda m, x: m(x).sum(), r"returned shape \(\)"),
        (lambda m, x: m(x)[:0], r"returned shape \(0, 4\)"),
        (lambda m, x: m(x).detach(), "without a graph"),
        (
            lambda m, x: x.clone().requires_grad_(),
            "does not depend on any traced parameter|cannot run this forward",
        ),
    ],
)
def test_wrong_forwards_are_refused(forward: Callable[..., Any], message: str, engine: str) -> None:
    case = Case(nn.Linear(4, 4), (torch.randn(SAMPLES, 4),), forward)
    with pytest.raises(GradientError, match=message):
        features(case, engine)


@pytest.mark.parametrize(
    "cotangent", [lambda e, rows: e.sum(), lambda e, rows: None, lambda e, rows: e[..., :1]]
)
def test_wrong_cotangents_are_refused(cotangent: Callable[..., Any]) -> None:
    with pytest.raises(GradientError, match=r"cotangent\(e, rows\)` returned.*expected e's shape"):
        features(build("linear_2d"), cotangents=[cotangent])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_cotangents_of_another_dtype(dtype: torch.dtype) -> None:
    case = build("linear_2d")
    ours = features(case, cotangents=[lambda e, rows: (4 * weighted(e, rows)).round().to(dtype)])
    assert torch.equal(
        ours, features(case, cotangents=[lambda e, rows: (4 * weighted(e, rows)).round()])
    )


def test_empty_batches_are_refused() -> None:
    with pytest.raises(GradientError, match="batch_size=0"):
        GradientTracer(nn.Linear(2, 2)).vjps(lambda rows: rows, [], 0)


def test_a_shared_input_that_does_not_matter_is_passed_over() -> None:
    module = nn.ModuleDict({"time": nn.Linear(3, 4), "main": nn.Linear(4, 4)})
    t, x = torch.randn(1, 3), torch.randn(SAMPLES, 4)
    unused = Case(module, (x,), lambda m, x: m["main"](x + m["time"](t).detach()))
    assert row_error(features(unused), features(unused, "loop")) < TOLERANCE


class Gated(nn.Module):
    """A layer on [T, B, C] that has no gradient while its gate is shut, as a LoRA before its first
    step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.gate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.gate * self.inner(x.transpose(0, 1)).transpose(0, 1))


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every call of `torch.autograd.grad`."""
    passes: list[None] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (passes.append(None), grad(*a, **k))[1]
    )
    return passes


def test_a_layer_without_gradient_is_looked_at_again() -> None:
    torch.manual_seed(0)
    case = Case(Gated(), (torch.randn(SAMPLES, SAMPLES, 4),))
    tracer, loop = (
        GradientTracer(case.module, PROJECTION, engine=engine) for engine in ("hooks", "loop")
    )
    for gate in (0.0, 0.0, 1.0, 2.0):
        case.module.gate = gate  # type: ignore[assignment]
        ours, theirs = (each.vjps(case.forward, [weighted], SAMPLES)[0] for each in (tracer, loop))
        assert row_error(ours, theirs) < TOLERANCE
        assert (ours[:, :16] == 0).all() == (gate == 0)


def test_layouts_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("frames_first")
    tracer = GradientTracer(case.module, PROJECTION)
    passes = counted_passes(monkeypatch)
    counts = []
    for batch_size in (SAMPLES, SAMPLES, SAMPLES - 1, SAMPLES, SAMPLES - 1, 1):
        passes.clear()
        tracer.vjps(case.forward, [weighted, weighted], batch_size)
        counts.append(len(passes))
    assert counts == [8, 2, 7, 2, 2, 2]


@pytest.mark.parametrize("name", LARGE)
def test_layouts_of_the_usual_networks_are_remembered(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(name)
    tracer = GradientTracer(case.module, PROJECTION)
    tracer.vjps(case.forward, [weighted], 2)
    passes = counted_passes(monkeypatch)
    tracer.vjps(case.forward, [weighted], 2)
    assert len(passes) == 1


def test_groups_of_samples_tell_who_shares_a_row() -> None:
    for batch_size in range(2, 40):
        groups = _groups(batch_size)
        assert len(groups) == min(batch_size, 2 * (batch_size - 1).bit_length())
        owners = {tuple(column) for column in groups.T.tolist()}
        assert len(owners) == batch_size
        pairs = torch.combinations(torch.arange(batch_size))
        shared = (groups[:, pairs[:, 0]] | groups[:, pairs[:, 1]]).T.tolist()
        assert owners.isdisjoint(map(tuple, shared))


@pytest.mark.parametrize("name", ["conditional_unet", "folded_batch", "called_twice"])
def test_check_passes(name: str) -> None:
    case = build(name)
    for batch_size in (1, SAMPLES):
        GradientTracer(case.module, PROJECTION).check(case.forward, [weighted], batch_size)


def test_check_names_layers_whose_samples_are_not_independent() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(x / x.norm()) + 10 * self.before(x)

    case = Case(Normed(), (torch.randn(SAMPLES, 4),))
    with pytest.raises(
        GradientError, match=r"batch of 6 differ.*1 layers: after \(.*batch first.*HINT"
    ):
        GradientTracer(case.module, PROJECTION).check(
            case.forward, [lambda e, rows: torch.ones_like(e)], SAMPLES
        )


def test_check_tries_another_batch_size_and_order() -> None:
    class InPairs(nn.Module):
        """Right for six samples, wrong for two."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x if len(x) != 2 else x.flip(0))

    case = Case(InPairs(), (torch.randn(SAMPLES, 4),))
    with pytest.raises(GradientError, match=r"batch of 2 differ.*layer"):
        GradientTracer(case.module, PROJECTION).check(case.forward, [weighted], SAMPLES)


def test_layers_can_weigh_the_same() -> None:
    """Each layer's part of a row at norm 1, against tracers of one layer each; a layer without
    gradient stays zero."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    x, weight = torch.randn(3, 5), torch.randn(3, 4) * torch.tensor([[1.0], [100.0], [0.0]])

    def rows(layers: list[str] | None, dim: int | None) -> tuple[GradientTracer, torch.Tensor]:
        tracer = GradientTracer(network, Projection(rank=3, dim=dim), layers=layers)
        return tracer, tracer.vjps(
            lambda r: network(x[r]), [lambda e, r: weight[r]], 3, sketch=False
        )[0]

    for dim in (None, 20):
        tracer, joined = rows(None, dim)
        assert joined.shape == (3, tracer.width)
        expected = []
        for name in tracer.block_names:
            single, part = rows([name], dim)
            norm = part.norm(dim=1, keepdim=True)
            unit = torch.where(norm > 0, part / norm, torch.zeros(()))
            expected.append(single.sketch(unit))
        total = torch.cat(expected, 1) if dim is None else torch.stack(expected).sum(0)
        torch.testing.assert_close(tracer.sketch(joined, unit_layers=True), total)
        assert tracer.sketch(joined, unit_layers=True)[2].eq(0).all()
        torch.testing.assert_close(
            tracer.sketch(joined),
            tracer.vjps(lambda r: network(x[r]), [lambda e, r: weight[r]], 3)[0],
        )
    before = joined.clone()
    tracer.sketch(joined, unit_layers=True)
    assert torch.equal(joined, before)


@pytest.mark.parametrize("layers", [[], "*attn*", True, 3, [None], {"0": 1}])
def test_layers_that_are_no_list_of_patterns_are_refused(layers: Any) -> None:
    with pytest.raises(GradientError, match=r"layers=.*expected a list of patterns.*HINT"):
        GradientTracer(nn.Linear(2, 2), layers=layers)
