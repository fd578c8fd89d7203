"""What the arguments of a method's parts may be: plain numbers, within what the computation takes.

They come from users, who have numbers of numpy and torch, and from manifests, which have anything.
"""

import math
from collections.abc import Callable
from typing import Any

from ctrak_lightning.errors import MethodError, shorten

MOST_PARTS = 1000
"""Dampings of a rule, objectives of a Joint, terms of a query: each costs memory or passes."""
LARGEST_INTEGER = 2**63 - 1


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's; tuples and lists as lists of such; all else as it
    is.

    Example:
        >>> import numpy as np
        >>> plain((np.float64(0.5), [np.int64(2)], "text"))
        [0.5, [2], 'text']
    """
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    # By what it has: np.float64 is a float, and not a plain one.
    if not hasattr(value, "item") or getattr(value, "ndim", 0) != 0:
        return value
    return value.item()


def number(value: Any) -> float | int | None:
    """A finite number as a plain one; None of what is none, such as a boolean."""
    value = plain(value)
    try:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None
    except OverflowError:  # an integer that no float holds
        return None


def check_number(
    part: Any,
    field: str,
    expected: str = "a finite number",
    fits: Callable[[float], bool] = lambda value: True,
) -> None:
    """Makes a field of a frozen dataclass a plain number.

    Raises:
        MethodError: it is no finite number, or does not fit.
    """
    found = number(getattr(part, field))
    if found is None or not fits(found):
        refuse(part, field, expected)
    object.__setattr__(part, field, found)


def check_integer(part: Any, field: str, least: int = 1, optional: bool = False) -> None:
    """Makes a field of a frozen dataclass a plain integer.

    Raises:
        MethodError: it is none, or below ``least``, or beyond any that is counted.
    """
    value = plain(getattr(part, field))
    if not (value is None and optional) and not (
        isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_INTEGER
    ):
        refuse(part, field, f"an integer of at least {least}" + (" or None" if optional else ""))
    object.__setattr__(part, field, value)


def check_boolean(part: Any, field: str) -> None:
    """Makes a field of a frozen dataclass a plain boolean.

    Raises:
        MethodError: it is none.
    """
    value = plain(getattr(part, field))
    if not isinstance(value, bool):
        refuse(part, field, "True or False")
    object.__setattr__(part, field, value)


def refuse(part: Any, field: str, expected: str) -> None:
    """Raises a MethodError: a field of this part is not what is expected."""
    given = shorten(getattr(part, field), 120)
    raise MethodError(
        f"{type(part).__name__}({field}={given}): expected {expected}. HINT: a store holds plain "
        "numbers; one that was altered wants its backup."
    )
