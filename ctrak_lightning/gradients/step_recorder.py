"""Per-sample gradients from a training step's own forward and backward pass."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ctrak_lightning.errors import GradientError
from ctrak_lightning.gradients.hooks import (
    REENTRANT,
    Call,
    Recording,
    require_tensors,
    tensors_in,
    walk,
)
from ctrak_lightning.gradients.layers import Layer
from ctrak_lightning.gradients.layouts import Layout, Layouts, NotBySampleError
from ctrak_lightning.gradients.modes import full_precision
from ctrak_lightning.gradients.projection import BlockProjector

_LOOKS = 8
"""Steps in which layers without a gradient so far are looked at; after them in steps of every power
of two."""


class StepRecorder:
    """Follows training steps: projects what the traced layers are given in the forward pass, and
    contracts it with the cotangents that arrive in the backward pass.

    It changes nothing in the step: no tensor, no graph, no ``.grad``, no random state; what its
    hooks meet inside the two passes is raised after them. One step is :meth:`begin`, the forward
    pass, :meth:`before_backward`, the backward pass, :meth:`rows`.

    Args:
        module: the network, whose output shows how its layers lay out the samples.
        layers: the traced layers.
        projector: their projections.
        layouts: what has been seen of their layouts.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[Layer],
        projector: BlockProjector,
        layouts: Layouts,
    ) -> None:
        self._module = module
        self._layers, self._projector, self._layouts = layers, projector, layouts
        self._batch_size = self._steps = 0
        self._handles: list[RemovableHandle] = []
        self._counting: list[RemovableHandle] = []
        self.drop()

    def attach(self) -> None:
        """Puts the hooks on the layers and the network; :meth:`detach` takes them off.
        Idempotent."""
        if not self._handles:
            self._handles = [
                layer.module.register_forward_hook(
                    self._hook(layer), with_kwargs=True, prepend=True
                )
                for layer in self._layers
            ]
            self._handles.append(self._module.register_forward_hook(self._note_output))

    def detach(self) -> None:
        """Takes the hooks off; idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.drop()

    def drop(self) -> None:
        """Forgets the step that is under way."""
        self._is_recording = self._is_pulling = False
        self._problem: Exception | None = None
        self._recording = Recording(self._layers, self._projector)
        self._outputs: list[Tensor] = []
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        for handle in self._counting:
            handle.remove()
        self._counting = []
        self._arrivals: Counter[Tensor] = Counter()
        self._reached: Counter[str] = Counter()

    def begin(self, batch_size: int) -> None:
        """Before the forward pass of a batch; what an unfinished step left is dropped."""
        self.drop()
        self._batch_size = batch_size
        self._is_recording = True

    def before_backward(self, loss: Tensor, *, check: bool = True) -> None:
        """Between the forward and the backward pass.

        Args:
            loss: the scalar that the backward pass starts from.
            check: walk the loss's graph (some milliseconds) and refuse what could not be recorded.

        Raises:
            GradientError: a traced layer ran without a graph, its parameters enter the loss in
                another way too, or samples share the rows of its input.
        """
        self._is_recording = False
        self._raise_problem()
        self._recording.require_graphs()
        if check:
            self._check(loss)
        self._look()
        self._recording, self._outputs = Recording(self._layers, self._projector), []
        self._is_pulling = True

    def rows(self) -> Tensor:
        """After the backward pass: the joined blocks [B, P] float32 of ``d loss / d theta`` over
        what each sample did, on the device of the network; a layer without a contribution is zero.

        Raises:
            GradientError: no cotangent arrived at any layer, or more gradients at a parameter than
                were recorded.
        """
        self._is_pulling = False
        self._raise_problem()
        self._check_arrivals()
        if not self._parts:
            raise GradientError(
                "The backward pass reached no traced layer. Expected it to go through the "
                "denoiser. HINT: a compiled module does not call its layers' hooks; train it "
                "without `torch.compile`."
            )
        blocks = {name: sum(parts[1:], parts[0]) for name, parts in self._parts.items()}
        device = next(iter(blocks.values())).device
        with full_precision(device):
            joined = self._projector.join(blocks, self._batch_size, device)
        self.drop()
        return joined

    def _hook(self, layer: Layer) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
        ) -> None:
            # Not while checkpointing runs layers again in the backward pass: their first run has
            # been recorded. Nor another thread's calls, which are not the step's.
            if not self._is_recording or self._recording.is_another_threads():
                return
            with self._keeping_problem():
                require_tensors(layer, args, kwargs, output)
                if torch.is_grad_enabled() and output.requires_grad:
                    self._record(layer, args, kwargs, output)
                else:
                    self._recording.without_graph.add(layer.name)

        return hook

    @contextmanager
    def _keeping_problem(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the training step is not ours to stop
            self._problem = self._problem or error

    def _raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_recording:
            # The first alone: what comes beside the prediction need not be of samples.
            self._outputs += [one for one in tensors_in(output) if one.requires_grad][:1]

    def _record(
        self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        call = self._recording.add(layer, args, kwargs, output)

        # On the node, not the tensor: it gets the cotangent of the output as it was, whatever is
        # done to it in place.
        def pull(cotangents: tuple[Tensor | None, ...]) -> None:
            cotangent = cotangents[call.edge.output_nr]
            if cotangent is not None and self._is_pulling:
                with self._keeping_problem():
                    part = call.gradient(cotangent, self._layout(call), self._projector)
                    self._parts[layer.name].append(part)

        call.edge.node.register_prehook(pull)

    def _look(self) -> None:
        """Sees how the layers lay out the samples, where that has not been seen."""
        calls, batch_size = self._recording.calls, self._batch_size
        self._steps += 1
        often = self._steps <= _LOOKS or self._steps & (self._steps - 1) == 0
        self._layouts.follow(self._outputs, calls, batch_size)
        try:
            self._layouts.require(calls, batch_size)
            if self._layouts.fresh(calls, batch_size) or (
                often and self._layouts.silent(calls, batch_size)
            ):
                outputs = self._sorted_outputs()
                if any(node.name() == REENTRANT for output in outputs for node in walk(output)[0]):
                    self._layouts.learn_by_shape(calls, batch_size)
                else:
                    self._layouts.learn(outputs, calls, batch_size)
        except NotBySampleError as error:
            raise GradientError(
                "The rows of these layers' inputs belong to no sample of the training batch of "
                f"{batch_size} alone: {error.names}. Expected a row or more of each sample's own "
                "in every input, in a regular order. HINT: give the network one row per sample of "
                "every input (also of the timesteps and of position ids), use no reentrant "
                'checkpointing, exclude these layers with `layers=`, or use mode="capture", which '
                "traces them by a pass per sample."
            ) from error

    def _sorted_outputs(self) -> list[Tensor]:
        wrong = [
            tuple(output.shape)
            for output in self._outputs
            if output.shape[:1] != (self._batch_size,)
        ]
        if wrong or not self._outputs:
            given = f"an output of shape {wrong[0]}" if wrong else "no output with a graph"
            raise GradientError(
                f"The network gave {given} in a training batch of {self._batch_size} samples, "
                f"expected [{self._batch_size}, ...]. HINT: let the network return its samples "
                'first; mode="capture" traces any training step.'
            )
        return self._outputs

    def _layout(self, call: Call) -> Layout:
        layout = self._layouts.find(call, self._batch_size)
        if layout is None:
            raise GradientError(
                f"Layer {call.name!r} saw {math.prod(call.leading)} rows in a training batch of "
                f"{self._batch_size} samples, expected a number divisible by {self._batch_size}. "
                "HINT: give the network one row per sample of every input, or exclude the layer "
                "with `layers=`."
            )
        return layout

    def _check(self, loss: Tensor) -> None:
        hint = (
            "Expected the loss to depend on it through the layer's calls alone. HINT: a penalty "
            "on weights, or a weight that is used without calling the layer, belongs to no "
            "sample; exclude the layer with `layers=`, or take it out of the loss."
        )
        self._reached = self._recording.reached(*walk(loss), "loss", hint)
        # A backward pass within the backward pass, as of reentrant checkpointing, has a graph of
        # its own, which is not there yet.
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
        """Refuses parameters that were given gradients by another graph than the loss's, which
        gives each one sum."""
        for layer in self._layers:
            for name, parameter in layer.parameters.items():
                if self._arrivals[parameter] > min(self._reached[layer.name], 1):
                    self.drop()
                    raise GradientError(
                        f"Parameter {name!r} was given gradients by a backward pass within the "
                        f"backward pass, where its {type(layer.module).__name__} runs without "
                        "being recorded: reentrant checkpointing. Expected all calls in the "
                        "loss's own graph. HINT: use checkpointing with `use_reentrant=False`, or "
                        "exclude the layer with `layers=`."
                    )
