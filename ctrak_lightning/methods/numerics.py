"""By which kernels, and in which precision, a network is run when it is traced or asked."""

from dataclasses import dataclass
from typing import Any, get_args

from ctrak_lightning.errors import MethodError
from ctrak_lightning.gradients import Attention
from ctrak_lightning.store import StoreHeader
from ctrak_lightning.tasks import Precision

KEY = "numerics"
"""Where a store's header has them, beside the method."""


@dataclass(frozen=True, slots=True)
class Numerics:
    """How numbers arise that another machine or another precision would round otherwise.

    Args:
        attention: as of :func:`~ctrak_lightning.gradients.tracing_mode`.
        precision: as of Lightning's ``Trainer``: ``"true"`` is the network's own dtypes,
            ``"bf16-mixed"`` and ``"16-mixed"`` are autocast. Projections and sums are float32 in
            each.

    Raises:
        MethodError: one of them is unknown.
    """

    attention: Attention = "fused"
    precision: Precision = "true"

    def __post_init__(self) -> None:
        for name, known in (("attention", Attention), ("precision", Precision)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise MethodError(
                    f"{name}={value!r}: expected one of {get_args(known)}. HINT: "
                    'Trainer(precision="32-true") and "bf16-true" are "true" here.'
                )

    def facts(self) -> dict[str, Any]:
        """What a store's header says of it."""
        return {KEY: {"attention": self.attention, "precision": self.precision}}


EARLIER = Numerics("math", "true")
"""Of stores from before these were recorded."""


def numerics_of(header: StoreHeader) -> Numerics:
    """Those of a store's traces.

    Raises:
        ValueError, TypeError: the header describes none.
    """
    facts = header.method.get(KEY)
    return EARLIER if facts is None else Numerics(**facts)
