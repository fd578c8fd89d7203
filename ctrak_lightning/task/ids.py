"""Ids of samples as a store keeps them: text, whatever kind of text or whole number a data set
has."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from ctrak_lightning.errors import BatchError

_HINT = (
    "HINT: give every sample an id that is a str or an int, such as its file's name or its "
    "number in the data set."
)


def plain_ids(values: Iterable[Any]) -> list[str]:
    """The ids of a batch's samples as text: strings as they are, whole numbers of Python, numpy and
    torch in decimal.

    Args:
        values: B ids, or a tensor or array [B] of whole numbers, on any device.

    Raises:
        BatchError: an id is something else, or empty.

    Example:
        >>> plain_ids(["cat.png", 7]), plain_ids(np.array([1000, 1001]))
        (['cat.png', '7'], ['1000', '1001'])
    """
    if isinstance(values, str):
        raise BatchError(
            f"Sample ids: {values!r} is one str, expected one id for each sample. {_HINT}"
        )
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise BatchError(
                f"Sample ids: an array of shape {tuple(values.shape)}, expected [B]: one id for "
                f"each. {_HINT}"
            )
        values = list(values)
    return [plain_id(value) for value in values]


def plain_id(value: Any) -> str:
    """One id as text; see :func:`plain_ids`."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        # `str(tensor)` depends on the device and on torch's printing options.
        if not value or (value.startswith("tensor(") and value.endswith(")")):
            raise BatchError(f"Sample ids: {value!r} names no sample. {_HINT}")
        return str(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(int(value))
    raise BatchError(
        f"Sample ids: {value!r} is {type(value).__name__}, expected a str or a whole number. "
        f"{_HINT}"
    )
