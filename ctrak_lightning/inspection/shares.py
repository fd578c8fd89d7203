"""Which owners of a concept have a curve of their own."""

from collections.abc import Sequence

from ctrak_lightning.attribution import Share

OTHERS = "others"
MOST, NEWCOMERS = 10, 5


class ShareCurves:
    """Keeps a concept's owners to a few curves: all of them where there are no more than ``MOST``;
    else the ``NEWCOMERS`` with the largest shares at each checkpoint, up to ``MOST`` in all, and
    the sum of the rest.

    An owner that once had a curve keeps it. (At the first checkpoints a concept may not be learnt
    yet, and the largest shares be noise: so not all curves are given away at once.)
    """

    def __init__(self) -> None:
        self._groups: list[str] = []

    def values(self, shares: Sequence[Share]) -> tuple[dict[str, float], float | None]:
        """The shares of the groups that have a curve, by group, and the sum of all others; None
        where there are no others.

        Args:
            shares: of all groups, largest first.
        """
        newcomers = shares if len(shares) <= MOST else shares[:NEWCOMERS]
        for share in newcomers:
            if share.group not in self._groups and len(self._groups) < MOST:
                self._groups.append(share.group)
        by_group = {share.group: share.share for share in shares}
        shown = {group: by_group[group] for group in self._groups}
        return shown, None if len(shown) == len(by_group) else max(0.0, 1.0 - sum(shown.values()))
