"""What is traced: blocks of parameters, kinds of layers, and the groups that answers count them
in."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from ctrak_lightning._moved import names_of
from ctrak_lightning.errors import ExtensionError, GradientError, shorten
from ctrak_lightning.gradients.layouts import Layout
from ctrak_lightning.utilities.naming import inside, is_own, place_of


class Block:
    """Parameters whose gradient is one matrix [rows, cols] per sample.

    Args:
        name: the block's name, which seeds its projection.
        module: the module that owns the parameters.
        own_names: names of the traced parameters within ``module``.
    """

    rows: int
    cols: int

    def __init__(self, name: str, module: nn.Module, own_names: Sequence[str]) -> None:
        self.name = name
        self.module = module
        self.own_names = sorted(own_names)
        self.prefix = name

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The traced parameters by their names from the traced root."""
        dot = f"{self.prefix}." if self.prefix else ""
        return {f"{dot}{own}": self.module.get_parameter(own) for own in self.own_names}

    @abstractmethod
    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Parameters' gradients ``[B, *shape]`` by own name, laid out as [B, rows, cols]."""


def member_of(block: Block, name: str) -> str:
    """A member of a block's kind and the layer, as messages name them."""
    return (
        f"{place_of(type(block))}.{name}, of layer {block.name or type(block.module).__name__!r},"
    )


def require_shape(block: Block, member: str, given: Any, *expected: int | None) -> Tensor:
    """What a member of a block's kind gave.

    Raises:
        ExtensionError: it is no tensor of the ``expected`` shape; None as the last size stands for
            any number of dimensions.
    """
    known = expected[:-1] if expected[-1] is None else expected
    if isinstance(given, Tensor):
        shape = tuple(given.shape)
        if shape[: len(known)] == known and (len(shape) == len(known) or known != expected):
            return given
    shown = f"shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    wanted = ", ".join("..." if size is None else str(size) for size in expected)
    raise ExtensionError(
        f"{member_of(block, member)} returned {shown}, expected a tensor [{wanted}]. HINT: "
        "ctrak_lightning.Layer describes what each member is given and what it has to return."
    )


class BareParameter(Block):
    """A parameter without a layer kind, as a 1 x n matrix; only the reference engines trace it."""

    def __init__(self, name: str, module: nn.Module, own_name: str) -> None:
        super().__init__(name, module, [own_name])
        self.prefix = name.removesuffix(own_name).removesuffix(".")
        self.rows, self.cols = 1, module.get_parameter(own_name).numel()

    def matrix(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return gradients[self.own_names[0]].flatten(1).unsqueeze(1)


class Layer(Block):
    """A kind of layer: how its module's inputs and output cotangents become per-sample gradients,
    without one for each sample. A subclass is made known by
    :func:`~ctrak_lightning.register_layer`.

    The gradient of one sample's parameters is laid out as a matrix G [rows, cols] (for nn.Linear
    [out, in + 1], with the bias as a column), and what is stored of it is ``left.T @ G @ right``,
    where ``left`` is P_out [rows, p_out] and ``right`` P_in [cols, p_in]; a side that is not
    projected is the identity. :meth:`keep` runs in the forward pass, :meth:`contract` in the
    backward pass, for each call of the module; the calls' shares are summed. An input has R rows,
    positions or images, of all samples; a :class:`~ctrak_lightning.gradients.layouts.Layout` sorts
    them by sample. The trial before training compares the rows with a pass for each sample, so a
    wrong formula is refused and not stored.

    Args:
        name: the block's name.
        module: of a class that the kind is registered for.
        own_names: its traced parameters, of those in ``names``; the others are frozen.

    Raises:
        GradientError: this module cannot be traced exactly; the message is the reason that the user
            is told.
    """

    names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """The parameters that the kind knows."""
    group: ClassVar[str] = "other layers"
    """What the layers are counted as in an answer by layers, outside attention and feed-forward
    modules."""

    def __init__(self, name: str, module: Any, own_names: Sequence[str]) -> None:
        super().__init__(name, module, own_names)
        self.layer = module
        self.has_weight, self.has_bias = "weight" in own_names, "bias" in own_names

    @abstractmethod
    def event_dims(self, x: Tensor) -> int:
        """How many trailing dimensions of an input ``x`` belong to one position or image; the
        others are batch."""

    def leading(self, x: Tensor) -> tuple[int, ...]:
        """The sizes of an input's batch dimensions; () of one position or image alone."""
        return tuple(x.shape[: max(x.dim() - self.event_dims(x), 0)])

    @abstractmethod
    def keep(self, x: Tensor, output: Tensor, right: Tensor) -> Tensor:
        """What must be kept of an input until its cotangent arrives, given P_in ``right`` [cols,
        p_in]: [R, ...], one entry for each of its rows."""

    @abstractmethod
    def contract(
        self, kept: Tensor, cotangent: Tensor, left: Tensor, right: Tensor, layout: Layout
    ) -> Tensor:
        """Projected gradient [B, p_out, p_in] from what was kept [R, ...] and the output's
        cotangent, which has the output's shape. ``layout.by_sample`` takes [R, ...] to [B, R / B,
        ...]."""


Kind = TypeVar("Kind", bound=type[Layer])
_KINDS: dict[str, type[Layer]] = {}
"""By the place of the module's class."""


def register_layer(*modules: type[nn.Module] | str) -> Callable[[Kind], Kind]:
    """Makes a kind of layer known, as a decorator of a :class:`~ctrak_lightning.Layer`: modules of
    these classes are then traced by it.

    So are those of subclasses that compute as they do: with a ``forward`` of its own a class is
    another layer.

    A store records the kinds from outside that made its rows, and is asked with these only: import
    the module that registers them before.

    Args:
        modules: the classes, or the places of classes that need not be imported
            (``"package.module.Class"``).

    Raises:
        GradientError: there is none, one is no class of modules or has a kind already, or the kind
            lacks something. To register a class again, as a notebook does, replaces it.

    Example::

        @register_layer(Scale)
        class ScaleLayer(Layer):
            ...
    """
    places = []
    for module in modules:
        if isinstance(module, str):
            # A class is found by its module's name and its own: no other text is ever one's place.
            known = "." in module and all(
                part.isidentifier() or part == "<locals>" for part in module.split(".")
            )
        else:
            known = isinstance(module, type) and issubclass(module, nn.Module)
        if not known:
            raise GradientError(
                f"register_layer({shorten(module)}): expected a subclass of nn.Module, or its "
                "place as text, 'package.module.Class'. HINT: the class, and not a layer of it: "
                "@register_layer(Scale)."
            )
        places.append(module if isinstance(module, str) else _place(module))
    if not places:
        raise GradientError(
            "register_layer(): expected the classes of modules that the kind traces. HINT: "
            "@register_layer(Scale)."
        )

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Layer)):
            raise GradientError(
                f"register_layer({', '.join(places)}) of {kind!r}: expected a subclass of "
                "ctrak_lightning.Layer."
            )
        lacking = [
            name for name in dir(kind) if getattr(getattr(kind, name), "__isabstractmethod__", 0)
        ]
        if lacking:
            raise GradientError(
                f"register_layer({', '.join(places)}): {kind.__name__} lacks {', '.join(lacking)}, "
                "which ctrak_lightning.Layer describes."
            )
        _check_kind(kind)
        for place in places:
            owner = _KINDS.get(place, kind)
            if _place(owner) != _place(kind):
                raise GradientError(
                    f"register_layer({place}): {owner.__name__} traces it already. HINT: register "
                    f"{kind.__name__} for a subclass with a `forward` of its own."
                )
        _KINDS.update(dict.fromkeys(places, kind))
        return kind

    return register


def _check_kind(kind: type[Layer]) -> None:
    """Refuses a kind of which its class alone says that no layer can be made or traced."""
    problem = None
    if kind.__init__ is Layer.__init__ and not (hasattr(kind, "rows") and hasattr(kind, "cols")):
        problem = (
            "nothing sets `rows` and `cols`, the sizes of a sample's gradient as a matrix. HINT: "
            "set both in __init__(self, name, module, own_names)"
        )
    elif not (
        isinstance(kind.names, (tuple, list))
        and kind.names
        and all(isinstance(name, str) and name for name in kind.names)
    ):
        problem = (
            f"names={shorten(kind.names)}, expected the parameters that it knows, as texts. HINT: "
            "names = ('weight', 'bias')"
        )
    elif not (isinstance(kind.group, str) and kind.group):
        problem = f"group={shorten(kind.group)}, expected a text. HINT: leave it out"
    else:
        try:
            inspect.signature(kind).bind("name", None, [])
        except TypeError as error:
            problem = (
                f"it is not made of (name, module, own_names): {error}. HINT: "
                "__init__(self, name, module, own_names)"
            )
    if problem:
        raise GradientError(f"register_layer of {kind.__name__}: {problem}.")


def registered_place(module: nn.Module, unused: Collection[str] = ()) -> str | None:
    """The place of the class whose kind traces a module exactly, or None. A class, or an instance,
    that computes in its own way is another layer.

    Args:
        module: the module.
        unused: places of classes that are taken as if nothing were registered for them.
    """
    kind = type(module)
    if any(name in vars(module) for name in _COMPUTING):
        return None
    for base in kind.__mro__:
        place = _place(base)
        if (
            place in _KINDS
            and place not in unused
            and all(getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING)
        ):
            return place
    return None


def layer_kind(module: nn.Module, unused: Collection[str] = ()) -> type[Layer] | None:
    """The kind that traces a module exactly, or None; ``unused`` as in :func:`registered_place`."""
    place = registered_place(module, unused)
    return None if place is None else _KINDS[place]


def kinds_from_outside() -> dict[str, str]:
    """The places of the registered kinds that are not the library's own, by the places of the
    classes that they trace."""
    return {place: _place(kind) for place, kind in _KINDS.items() if not is_own(kind)}


_COMPUTING = ("forward", "_conv_forward", "__call__")


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def layer_group(root: nn.Module, block: Block) -> str:
    """The group of a block within the network ``root``.

    What is inside an attention or a feed-forward module (an adapter's matrices too) counts with it;
    other layers by their kind.

    Example:
        >>> from ctrak_lightning.gradients.kinds.linear import LinearLayer
        >>> network = nn.Sequential(nn.Linear(2, 2))
        >>> layer_group(network, LinearLayer("0", network[0], ["weight"]))
        'other layers'
    """
    module = root
    for part in block.prefix.split("."):
        if group := _container_group(inside(module)):
            return group
        module = module.get_submodule(part)
    return block.group if isinstance(block, Layer) else Layer.group


def _container_group(module: nn.Module) -> str | None:
    name = type(module).__name__
    if name.endswith("FeedForward"):
        return "feed-forward"
    if not name.endswith("Attention"):
        return None
    # diffusers' Attention says of itself which kind it is; classes that do not are told by their
    # names.
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "joint attention"
    if getattr(module, "is_cross_attention", "Cross" in name):
        return "cross-attention"
    return "attention" if isinstance(module, nn.MultiheadAttention) else "self-attention"


if not TYPE_CHECKING:
    __getattr__ = names_of(__name__)
