"""How the rows of a store are kept. A new format is an entry here, of a dtype that numpy has, and
what :func:`stored_unit` does with it."""

from typing import Literal

import torch
from torch import Tensor

RowDtype = Literal["float32", "float16", "int8"]
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "int8": 1}
_INT8_MAX = 127


def stored_unit(unit: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Unit-norm rows [n, k] as a store of ``dtype`` keeps them [n, k], and the scale of each row,
    float32 [n].

    float16 overflows at 65504, which a unit-norm row never reaches. int8 rows are symmetric: the
    entry of the largest magnitude becomes 127 or -127, so that no entry is off by more than half of
    ``scale``.
    """
    if dtype != "int8":
        return unit.to(getattr(torch, dtype)), torch.ones(len(unit))
    scale = (unit.abs().amax(1) / _INT8_MAX).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of rows of zeros
    rounded = (unit / scale.to(unit.dtype)[:, None]).round().clamp(-_INT8_MAX, _INT8_MAX)
    return rounded.to(torch.int8), scale
