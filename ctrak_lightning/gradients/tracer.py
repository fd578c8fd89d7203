"""GradientTracer: features of samples from one forward pass and one vector-Jacobian product per
cotangent."""

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ctrak_lightning.errors import GradientError, listed
from ctrak_lightning.gradients.checks import Cotangent, Forward, Scaled
from ctrak_lightning.gradients.hooks import hooked_vjps
from ctrak_lightning.gradients.layers import (
    Block,
    kinds_from_outside,
    layer_group,
    registered_place,
)
from ctrak_lightning.gradients.layouts import Layouts, NotBySampleError
from ctrak_lightning.gradients.modes import Attention, tracing_mode
from ctrak_lightning.gradients.plan import plan_blocks, refuse_sharded
from ctrak_lightning.gradients.projection import BlockProjector, Projection
from ctrak_lightning.gradients.reference import functional_vjps, looped_vjps
from ctrak_lightning.gradients.step_recorder import StepRecorder

Engine = Literal["hooks", "auto", "loop", "functional"]
CHECK_TOLERANCE = 1e-3
TF32_TOLERANCE = 2e-2
HALF_TOLERANCE = 0.1
DEFAULT_PROJECTION = Projection()


class UntracedParameterWarning(UserWarning):
    """Parameters that require a gradient but that the hook engine cannot trace exactly; the message
    names them all.

    Why: they have no layer whose rows are each sample's own, so what they learn is in no score.

    What to do: freeze them or leave them out with ``layers=``, if that is meant;
    ``mode="capture"`` (``engine="auto"``) traces them, slowly.
    """


class SlowParameterWarning(UserWarning):
    """Parameters without a hook, or of layers whose input samples share, which are traced by a pass
    per sample; the message names them all.

    Why: the traces are right, and a capture takes many times as long.

    What to do: leave the layers out with ``layers=``, such as ``["*attn2*"]``, if time matters
    more than they do.
    """


@dataclass(frozen=True, slots=True)
class Checked:
    """What :meth:`GradientTracer.check` found right: for each cotangent the rows [B, P] of the
    batch, before the sketch, and the names of the blocks with a gradient that is not zero. Of the
    others nothing can be said."""

    rows: list[Tensor]
    reached: set[str]


class GradientTracer:
    """Projected per-sample gradients J^T v of a network's output over its trainable parameters.

    The network must treat its samples independently. How a layer lays them out (batch first,
    positions first, frames beside samples) is seen from the gradients, by some backward passes when
    a shape first occurs. :meth:`check` compares with the per-sample loop.

    Args:
        module: the network. Which of its parameters require a gradient is read once, here.
        projection: rank, length and seed of the features.
        layers: `fnmatch` patterns for the names of the modules whose parameters are traced; None
            traces all.
        engine: "hooks"; "auto", which also traces the parameters that have no hook, such as DoRA's
            magnitudes, and the layers whose input samples share, such as a table of positions, by a
            pass per sample; or, as references, "loop" (a pass per sample for all) and "functional"
            (`torch.func`).
        trained: names of the module's parameters that training changes; None takes those that
            require a gradient.
        unused_kinds: places of classes of modules, ``"package.module.Class"``, whose kinds of
            layers are not used, as if none were registered for them.
        attention: as of :func:`~ctrak_lightning.gradients.tracing_mode`. The engine "functional"
            takes "math" always: ``torch.func`` has no rule for the others.

    Raises:
        GradientError: nothing can be traced, a pattern matches nothing, or an argument is of the
            wrong kind.

    Warns:
        UntracedParameterWarning: the hook engine cannot trace some of the parameters.
        SlowParameterWarning: engine "auto" traces some by a pass per sample. Of layers whose input
            samples share, :meth:`vjps` warns.

    Example:
        >>> network = nn.Linear(4, 4)
        >>> x = torch.randn(3, 4)
        >>> tracer = GradientTracer(network, Projection(rank=2, dim=None))
        >>> [features] = tracer.vjps(lambda rows: network(x[rows]), [lambda e, rows: e], batch_size=3)
        >>> features.shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        module: nn.Module,
        projection: Projection = DEFAULT_PROJECTION,
        *,
        layers: Sequence[str] | None = None,
        engine: Engine = "hooks",
        trained: Collection[str] | None = None,
        unused_kinds: Collection[str] = (),
        attention: Attention = "fused",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise GradientError(
                f"`GradientTracer(module={type(module).__name__})`: expected the network, an "
                "`nn.Module`. HINT: give a task's `denoiser`."
            )
        if engine not in get_args(Engine):
            raise GradientError(
                f"`GradientTracer(engine={engine!r})`: expected one of {get_args(Engine)}. HINT: "
                "use 'hooks'."
            )
        if attention not in get_args(Attention):
            raise GradientError(
                f"`GradientTracer(attention={attention!r})`: expected one of "
                f"{get_args(Attention)}. HINT: 'fused', the kernels that training takes."
            )
        is_list = isinstance(layers, (list, tuple)) and len(layers) > 0
        if layers is not None and not (is_list and all(isinstance(each, str) for each in layers)):
            raise GradientError(
                f"`GradientTracer(layers={layers!r})`: expected a list of patterns, or None for "
                "all layers. HINT: ['*attn2*']."
            )
        refuse_sharded(module)
        self.module = module
        self.projection = projection
        self.engine = engine
        self.attention: Attention = "math" if engine == "functional" else attention
        self._patterns = None if layers is None else list(layers)
        plan = plan_blocks(module, self._patterns, trained, unused_kinds)
        self._layers = plan.layers
        outside = kinds_from_outside()
        used = {registered_place(layer.module, unused_kinds) for layer in plan.layers}
        self._kinds = {place: kind for place, kind in sorted(outside.items()) if place in used}
        self._bare: list[Block] = [] if engine == "hooks" else [block for block, _ in plan.bare]
        self._blocks: list[Block] = [*plan.layers, *self._bare]
        self._leaves_out = engine == "hooks" and bool(plan.bare)
        self._layouts = Layouts()
        self._shared: set[str] = set()
        named = "; ".join(f"{block.name} ({reason})" for block, reason in plan.bare)
        if engine == "hooks" and plan.bare:
            if not plan.layers:
                raise GradientError(
                    "`GradientTracer(engine='hooks')`: none of the trainable parameters can be "
                    f"traced: {named}. Expected Linear, Conv, Embedding or norm layers. HINT: use "
                    '`engine="loop"`.'
                )
            warnings.warn(
                f"These trainable parameters are not traced: {named}. HINT: freeze them, or leave "
                'their modules out with `layers=`, if that is meant; `engine="auto"` traces '
                "them, slowly.",
                UntracedParameterWarning,
                stacklevel=2,
            )
        if engine == "auto" and plan.bare:
            warnings.warn(
                "These trainable parameters have no hook and are traced by a pass per sample, "
                f"which is slow: {named}. HINT: freeze them, or leave their modules out with "
                "`layers=`, if they do not matter.",
                SlowParameterWarning,
                stacklevel=2,
            )
        self._projector = BlockProjector(
            projection, {block.name: (block.rows, block.cols) for block in self._blocks}
        )

    @property
    def dim(self) -> int:
        """Length k of a feature row."""
        return self._projector.dim

    @property
    def leaves_out(self) -> bool:
        """Whether some of the parameters that were asked for have no block."""
        return self._leaves_out

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, in the order of their concatenation."""
        return list(self._projector.names)

    @property
    def parameter_names(self) -> list[str]:
        """Names of the traced parameters within the module, sorted."""
        return sorted(name for block in self._blocks for name in block.parameters)

    def describe(self) -> dict[str, Any]:
        """JSON facts that decide what a feature row means; rows of tracers with equal facts are
        comparable."""
        shapes = {
            name: list(p.shape) for block in self._blocks for name, p in block.parameters.items()
        }
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
        facts = {
            "projection": self.projection.to_dict(),
            "dim": self.dim,
            "layers": self._patterns,
            "parameters": len(shapes),
            "parameters_sha256": digest,
        }
        # Only where there are any, so that stores of before stay comparable.
        facts |= {"parameters_without_hook": len(self._bare)} if self._bare else {}
        return facts | ({"kinds": self._kinds} if self._kinds else {})

    @property
    def width(self) -> int:
        """Length P of a row before the sketch: all layers' projected gradients side by side."""
        return self._projector.width

    def sketch(self, rows: Tensor, *, unit_layers: bool = False, salt: int = 0) -> Tensor:
        """Rows [B, P] of ``vjps(..., sketch=False)`` as features [B, k].

        Args:
            rows: the layers' projected gradients side by side; sums of such rows will do, since all
                is linear.
            unit_layers: first scale every layer's part of a row to norm 1, so that layers weigh the
                same.
            salt: sketches of different salt are independent, so that several may be added.

        Raises:
            GradientError: another salt than 0 without a sketch, where sums of rows could not be
                told apart.
        """
        if salt and self.projection.dim is None:
            raise GradientError(
                f"`GradientTracer.sketch(salt={salt})`: the projection has no sketch (dim=None), "
                "expected one, for several objectives share a row. HINT: Projection(dim=4096)."
            )
        return self._projector.sketch(
            self._projector.unit_blocks(rows) if unit_layers else rows, salt
        )

    def layer_groups(self) -> dict[str, list[str]]:
        """The blocks by the kind of layer they are part of
        (:func:`~ctrak_lightning.gradients.layers.layer_group`), sorted."""
        groups: dict[str, list[str]] = {}
        for block in sorted(self._blocks, key=lambda block: block.name):
            groups.setdefault(layer_group(self.module, block), []).append(block.name)
        return dict(sorted(groups.items()))

    def only(self, rows: Tensor, blocks: Collection[str]) -> Tensor:
        """Rows [B, P] of ``vjps(..., sketch=False)`` with all but some blocks zero; over groups
        that hold each block once, the results and their sketches add up to the whole."""
        return self._projector.only(rows, blocks)

    def reached(self, rows: Tensor) -> set[str]:
        """The blocks that have a number other than zero in rows [B, P] of ``vjps(...,
        sketch=False)``."""
        return self._projector.reached(rows)

    def step_recorder(self) -> StepRecorder:
        """A recorder of the same rows [B, P] from training steps, without passes of its own; its
        layers are this tracer's.

        Raises:
            GradientError: the tracer has another engine than "hooks".
        """
        if self.engine != "hooks":
            raise GradientError(
                f"`GradientTracer(engine={self.engine!r}).step_recorder()`: expected the engine "
                '"hooks".'
            )
        return StepRecorder(self.module, self._layers, self._projector, self._layouts)

    def mode(self) -> AbstractContextManager[None]:
        """The state in which the network is traced
        (:func:`~ctrak_lightning.gradients.tracing_mode`)."""
        return tracing_mode(self.module, attention=self.attention)

    def vjps(
        self,
        forward: Forward,
        cotangents: Sequence[Cotangent],
        batch_size: int,
        *,
        sketch: bool = True,
    ) -> list[Tensor]:
        """Features of a batch, one tensor per cotangent.

        Runs in :meth:`mode`; `.grad`, training flags and random state stay as they are.

        Args:
            forward: maps row indices [b] (int64, on the module's device) to the network's output e
                [b, ...] for these rows, with its graph. The calls of the module made inside it are
                the ones traced.
            cotangents: each maps (e, rows) to v of e's shape. It may call `torch.autograd.grad(...,
                retain_graph=True)`.
            batch_size: number of rows B.
            sketch: False leaves the rows as they are before the sketch, for :meth:`sketch`.

        Returns:
            for each cotangent, features [B, k] float32; [B, P] without the sketch.

        Raises:
            GradientError: the outputs or cotangents have the wrong shape, or a layer cannot be
                traced exactly.
        """
        rows = self._rows(batch_size)
        joined = [
            self._projector.join(blocks, batch_size, rows.device)
            for blocks in self._run(forward, cotangents, rows, batch_size)
        ]
        return [self._projector.sketch(each) for each in joined] if sketch else joined

    def check(self, forward: Forward, cotangents: Sequence[Cotangent], batch_size: int) -> Checked:
        """Compares the first and last row of a batch with the per-sample loop, which assumes
        nothing about the layout; and of a batch of more than two these in a batch of their own, the
        other way round, for what fits one size by chance.

        Args:
            forward: as in :meth:`vjps`.
            cotangents: as in :meth:`vjps`.
            batch_size: number of rows B.

        Returns:
            the rows of the batch, and the blocks that a gradient reached.

        Raises:
            GradientError: a layer's rows differ by more than a thousandth of their norm (more in
                lower precision, where the kernels' rounding depends on the batch); names the
                layers.
        """
        rows = self._rows(batch_size)
        # Rows add up to the batch's gradient, so of two the first cannot be wrong alone.
        ends = rows[-1:] if batch_size == 2 else torch.unique(rows[[0, -1]]).flip(0)
        batched = self._run(forward, cotangents, rows, batch_size)
        with self.mode():
            looped = self._scaled(
                partial(looped_vjps, self._blocks, self._projector, forward),
                *(cotangents, ends, batch_size),
            )
        tried = [
            ([{name: block[ends] for name, block in ours.items()} for ours in batched], batch_size)
        ]
        if batch_size > 2:
            tried.append((self._run(forward, cotangents, ends, batch_size), len(ends)))
        for each, size in tried:
            for ours, theirs in zip(each, looped, strict=True):
                self._compare(ours, theirs, size, partial(self._changes, forward, rows))
        reached = {name for theirs in looped for name, block in theirs.items() if block.any()}
        return Checked(
            [self._projector.join(blocks, batch_size, rows.device) for blocks in batched], reached
        )

    def _changes(self, forward: Forward, rows: Tensor) -> float:
        """By how much two passes of the same rows differ."""
        with self.mode(), torch.no_grad():
            first, second = forward(rows).float(), forward(rows).float()
        size = first.norm().clamp(min=torch.finfo(first.dtype).tiny)
        return float((first - second).norm() / size)

    def _compare(
        self,
        ours: dict[str, Tensor],
        theirs: dict[str, Tensor],
        batch_size: int,
        changes: Callable[[], float],
    ) -> None:
        tolerance = self._tolerance()
        total = torch.stack([block.norm(dim=1) for block in theirs.values()]).norm(dim=0)
        wrong = []
        for name, block in theirs.items():
            difference = (ours.get(name, 0 * block) - block).norm(dim=1)
            # What is next to nothing beside the other layers may be rounding alone.
            scale = torch.maximum(block.norm(dim=1), tolerance**0.5 * total)
            if difference.gt(tolerance * scale).any():
                error = (difference / scale.clamp(min=torch.finfo(scale.dtype).tiny)).max()
                wrong.append(f"{name or type(self.module).__name__} ({float(error):.1e})")
        if wrong and (change := changes()) > tolerance:
            raise GradientError(
                f"Features of a batch of {batch_size} differ from the per-sample ones in "
                f"{len(wrong)} layers ({listed(wrong, show=str)}), and so do the network's outputs "
                f"in two passes of the same samples, by {change:.1e}. Expected the same output "
                "every time. HINT: look for random numbers that are drawn in evaluation mode too: "
                "`F.dropout` without `training=self.training`, `randn` in `forward` or `predict`, "
                "a `train()` inside them."
            )
        if wrong:
            raise GradientError(
                f"Features of a batch of {batch_size} differ from the per-sample ones in "
                f"{len(wrong)} layers: {', '.join(wrong)} (relative difference). Expected samples "
                "to be independent and the output to be batch first. HINT: exclude these layers "
                'with `layers=`, trace with a batch of 1, or use `engine="loop"`.'
            )

    def _tolerance(self) -> float:
        parameters = [p for block in self._blocks for p in block.parameters.values()]
        # Under autocast the layers' outputs are of another dtype than their parameters.
        seen = {p.dtype for p in parameters} | self._layouts.dtypes
        if seen & {torch.bfloat16, torch.float16}:
            return HALF_TOLERANCE
        is_reduced = any(p.is_cuda for p in parameters) and (
            torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        )
        return TF32_TOLERANCE if is_reduced else CHECK_TOLERANCE

    def _run(
        self, forward: Forward, cotangents: Sequence[Cotangent], rows: Tensor, batch_size: int
    ) -> list[dict[str, Tensor]]:
        blocks, projector = self._blocks, self._projector
        with self.mode():
            if self.engine == "loop":
                looped = partial(looped_vjps, blocks, projector, forward)
                return self._scaled(looped, cotangents, rows, batch_size)
            if self.engine == "functional":
                functional = partial(functional_vjps, blocks, projector, self.module, forward)
                return self._scaled(functional, cotangents, rows, batch_size)
            hooked = partial(self._hooked_and_looped, forward)
            try:
                return self._scaled(hooked, cotangents, rows, batch_size)
            except NotBySampleError as error:
                self._require_independence(forward, rows, error)
                self._loop_over(error)
            return self._scaled(hooked, cotangents, rows, batch_size)

    def _scaled(
        self,
        engine: Callable[[Sequence[Cotangent], Tensor], list[dict[str, Tensor]]],
        cotangents: Sequence[Cotangent],
        rows: Tensor,
        batch_size: int,
    ) -> list[dict[str, Tensor]]:
        """What an engine gives for cotangents of size 1, in the cotangents' own size: exact, for
        all is linear and the factors are powers of two. In float16 one of 1/D would be rounded
        away."""
        scaled = [Scaled(cotangent, batch_size) for cotangent in cotangents]
        return [
            each.undone(blocks, rows)
            for each, blocks in zip(scaled, engine(scaled, rows), strict=True)
        ]

    def _hooked_and_looped(
        self, forward: Forward, cotangents: Sequence[Cotangent], rows: Tensor
    ) -> list[dict[str, Tensor]]:
        hooked = [layer for layer in self._layers if layer.name not in self._shared]
        slow = [*self._bare, *(layer for layer in self._layers if layer.name in self._shared)]
        results: list[dict[str, Tensor]] = [{} for _ in cotangents]
        if hooked:
            results = hooked_vjps(hooked, self._projector, self._layouts, forward, cotangents, rows)
        if slow:
            # Not every state need reach them; the hooks refuse a pass that reaches nothing.
            looped = looped_vjps(
                slow, self._projector, forward, cotangents, rows, required=not hooked
            )
            results = [ours | theirs for ours, theirs in zip(results, looped, strict=True)]
        return results

    def _require_independence(
        self, forward: Forward, rows: Tensor, found: NotBySampleError
    ) -> None:
        """Refuses a network whose output for a sample depends on the others, where no gradient is
        one sample's."""
        with torch.no_grad():
            in_batch, alone = forward(rows)[-1].float(), forward(rows[-1:])[0].float()
        difference = float(
            (in_batch - alone).norm() / alone.norm().clamp(min=torch.finfo(alone.dtype).tiny)
        )
        if difference > self._tolerance():
            raise GradientError(
                "A sample's output depends on the other samples of its batch: alone it differs by "
                f"{difference:.1e}, and the rows of these layers belong to no sample alone: "
                f"{', '.join(found.names)}. Expected a network that treats its samples "
                "independently. HINT: look for statistics over the batch, such as a mean, in what "
                "comes after these layers."
            ) from found

    def _loop_over(self, error: NotBySampleError) -> None:
        """From here on traces these layers by a pass per sample, if the engine has one."""
        found = (
            f"The rows of these layers' inputs belong to no sample alone: {', '.join(error.names)}."
        )
        hint = (
            "HINT: give such a layer one row per sample (`position_ids.expand(batch, -1)`, also "
            "of the timesteps); or freeze it, or leave it out with `layers=`, if it does not "
            "matter"
        )
        if self.engine == "hooks":
            raise GradientError(
                f"{found} Expected rows of one sample each, in a regular order. {hint}; "
                '`engine="auto"` traces it by a pass per sample.'
            ) from error
        self._shared.update(error.names)
        warnings.warn(
            f"{found} They are traced by a pass per sample, which is slow. {hint}.",
            SlowParameterWarning,
            stacklevel=2,
        )

    def _rows(self, batch_size: int) -> Tensor:
        if batch_size < 1:
            raise GradientError(
                f"`batch_size={batch_size!r}`: expected at least one row. HINT: skip empty batches."
            )
        device = next(iter(self._blocks[0].parameters.values())).device
        return torch.arange(batch_size, device=device)
