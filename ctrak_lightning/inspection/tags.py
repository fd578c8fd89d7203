"""Names of concepts and owners as TensorBoard tags."""

import re
from collections.abc import Sequence

ROOT = "ctrak"
_LONGEST = 60


class TagNames:
    """Turns names into parts of a tag: letters, digits, ``_``, ``-`` and ``.`` only, and no two
    names alike.

    Args:
        reserved: parts that no name gets.

    Example:
        >>> names = TagNames()
        >>> names.of("a/b"), names.of("a b"), names.of("a/b")
        ('a_b', 'a_b_2', 'a_b')
    """

    def __init__(self, reserved: Sequence[str] = ()) -> None:
        self._taken = set(reserved)
        self._parts: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The part that stands for ``name``; the same at every call."""
        if name not in self._parts:
            self._parts[name] = self._free(name)
        return self._parts[name]

    def one_each(self, names: Sequence[str]) -> list[str]:
        """A part for each of several things, which may have the same name."""
        return [self._free(name) for name in names]

    def _free(self, name: str) -> str:
        wanted = re.sub(r"[^\w.\-]+", "_", name)[:_LONGEST]
        part, count = wanted, 1
        while part in self._taken:
            count += 1
            part = f"{wanted}_{count}"
        self._taken.add(part)
        return part
