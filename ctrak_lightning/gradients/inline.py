"""Per-sample gradients from a training step's own forward and backward pass."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients.hooks import anchor, walk
from ctrak_lightning.gradients.layers import Layer
from ctrak_lightning.gradients.modes import full_precision
from ctrak_lightning.gradients.projection import BlockProjector


class StepRecorder:
    """Follows training steps: projects what the traced layers are given in the forward pass, and contracts it with the
    cotangents that arrive in the backward pass.

    It changes nothing in the step: no tensor, no graph, no ``.grad``, no random state. One step is :meth:`begin`, the forward
    pass, :meth:`before_backward`, the backward pass, :meth:`rows`.

    Args:
        layers: the traced layers.
        projector: their projections.
    """

    def __init__(self, layers: Sequence[Layer], projector: BlockProjector) -> None:
        self._layers = layers
        self._projector = projector
        self._batch_size = 0
        self._is_recording = False
        self._is_pulling = False
        self._edges: list[tuple[Layer, GradientEdge]] = []
        self._without_graph: set[str] = set()
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._thread = get_ident()
        self._arrivals: Counter[Tensor] = Counter()
        self._reached: Counter[str] = Counter()
        self._counting: list[RemovableHandle] = []

    def attach(self) -> None:
        """Puts the hooks on the layers; :meth:`detach` takes them off. Idempotent."""
        if not self._handles:
            self._handles = [
                layer.module.register_forward_hook(self._hook(layer), with_kwargs=True, prepend=True)
                for layer in self._layers
            ]

    def detach(self) -> None:
        """Takes the hooks off; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def drop(self) -> None:
        """Forgets the step that is under way."""
        self._forget()

    def begin(self, batch_size: int) -> None:
        """Before the forward pass of a batch; what an unfinished step left is dropped."""
        self._forget()
        self._batch_size = batch_size
        self._thread = get_ident()
        self._is_recording = True

    def before_backward(self, loss: Tensor, *, check: bool = True) -> None:
        """Between the forward and the backward pass.

        Args:
            loss: the scalar that the backward pass starts from.
            check: walk the loss's graph (some milliseconds) and refuse what could not be recorded.

        Raises:
            GradientError: a traced layer ran without a graph, or its parameters enter the loss in another way too.
        """
        self._is_recording = False
        called = {layer.name for layer, _ in self._edges}
        if without_graph := sorted(self._without_graph - called):
            raise GradientError(
                f"These traced layers ran without a graph (`torch.no_grad()` or reentrant checkpointing): {without_graph}. "
                "Expected the training step's gradients to flow through them. HINT: use checkpointing with "
                "`use_reentrant=False`, or exclude them with `layers=`."
            )
        if check:
            self._check(loss)
        self._edges = []
        self._is_pulling = True

    def rows(self) -> Tensor:
        """After the backward pass: the joined blocks [B, P] float32 of ``d loss / d theta`` over what each sample did, on the
        device of the network; a layer without a contribution is zero.

        Raises:
            GradientError: no cotangent arrived at any layer, or more gradients at a parameter than were recorded.
        """
        self._is_pulling = False
        self._check_arrivals()
        if not self._parts:
            raise GradientError(
                "The backward pass reached no traced layer. Expected it to go through the denoiser. HINT: a compiled module "
                "does not call its layers' hooks; train it without `torch.compile`."
            )
        blocks = {name: sum(parts[1:], parts[0]) for name, parts in self._parts.items()}
        device = next(iter(blocks.values())).device
        with full_precision(device):
            joined = self._projector.join(blocks, self._batch_size, device)
        self._forget()
        return joined

    def _forget(self) -> None:
        self._is_recording = self._is_pulling = False
        self._edges = []
        self._without_graph = set()
        self._parts = defaultdict(list)
        for handle in self._counting:
            handle.remove()
        self._counting = []
        self._arrivals, self._reached = Counter(), Counter()

    def _hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            # Not while checkpointing runs layers again in the backward pass: their first run has been recorded.
            # Nor another thread's calls, which are not the step's.
            if not self._is_recording or get_ident() != self._thread:
                return
            if torch.is_grad_enabled() and output.requires_grad:
                self._record(layer, args[0] if args else next(iter(kwargs.values())), output)
            else:
                self._without_graph.add(layer.name)

        return hook

    def _record(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        x = x.detach()
        leading = x.shape[0] if x.dim() > layer.event_dims(x) else 1
        if leading % self._batch_size:
            raise GradientError(
                f"Layer {layer.name!r} saw an input of shape {tuple(x.shape)} in a training batch of {self._batch_size} "
                f"samples, expected a leading dimension divisible by {self._batch_size}. HINT: give the network one row per "
                "sample of every input (also of the timesteps), or exclude the layer with `layers=`."
            )
        left, right = self._projector.matrices(layer.name, x.device)
        with full_precision(x.device):
            kept = layer.keep(x, output, right, self._batch_size)
        version = kept._version
        edge = get_gradient_edge(anchor(output))
        self._edges.append((layer, edge))

        # On the node, not the tensor: it gets the cotangent of the output as it was, whatever is done to it in place.
        def pull(cotangents: tuple[Tensor | None, ...]) -> None:
            cotangent = cotangents[edge.output_nr]
            if cotangent is None or not self._is_pulling:
                return
            if kept._version != version:
                raise GradientError(
                    f"The input of layer {layer.name!r} was overwritten in place after the layer used it, expected it "
                    "unchanged. HINT: exclude the layer with `layers=`, or make the operation after it not in-place."
                )
            with full_precision(cotangent.device):
                part = layer.contract(kept, cotangent.detach(), left, right).flatten(1)
            self._parts[layer.name].append(part)

        edge.node.register_prehook(pull)

    def _check(self, loss: Tensor) -> None:
        nodes, uses = walk(loss)
        reached = Counter(layer.name for layer, edge in self._edges if edge.node in nodes)
        self._reached = reached
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                if uses[parameter] > reached[layer.name]:
                    raise GradientError(
                        f"Parameter {name!r} enters the loss {uses[parameter]} times, but only {reached[layer.name]} calls of "
                        f"its {type(layer.module).__name__} could be recorded. Expected the loss to depend on it through "
                        "the layer's calls alone. HINT: a penalty on weights, or a weight that is used without calling the "
                        "layer, belongs to no sample; exclude the layer with `layers=`, or take it out of the loss."
                    )
        # A backward pass within the backward pass, as of reentrant checkpointing, has a graph of its own, which is not there yet.
        self._counting = [
            parameter.register_hook(self._counter(parameter))
            for layer in self._layers
            for parameter in layer.parameters.values()
        ]

    def _counter(self, parameter: Tensor) -> Callable[[Tensor], None]:
        def count(gradient: Tensor) -> None:
            self._arrivals[parameter] += self._is_pulling

        return count

    def _check_arrivals(self) -> None:
        """Refuses parameters that were given gradients by another graph than the loss's, which gives each one sum."""
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                if self._arrivals[parameter] > min(self._reached[layer.name], 1):
                    self._forget()
                    raise GradientError(
                        f"Parameter {name!r} was given gradients by a backward pass within the backward pass, where its "
                        f"{type(layer.module).__name__} runs without being recorded: reentrant checkpointing. Expected all calls in "
                        "the loss's own graph. HINT: use checkpointing with `use_reentrant=False`, or exclude the layer with `layers=`."
                    )
