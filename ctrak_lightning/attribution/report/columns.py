"""Which metadata columns a page shows, and what each is to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ctrak_lightning.errors import ReportError

_GROUPS = ("owner", "artist")
_LICENCES = ("licence", "license")
_CAPTIONS = ("caption", "prompt", "text", "title")
_LINKS = ("uri", "url")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of metadata columns: all of them, those that have a part of their own on the page (None
    where the store lacks it), and those of web addresses."""

    names: list[str]
    group: str | None
    licence: str | None
    caption: str | None
    links: list[str]

    @classmethod
    def of(cls, names: Sequence[str], group: str | None) -> "Columns":
        """The columns of a store.

        Args:
            names: what the store has.
            group: whom shares are given to; by default the owner, else the artist.

        Raises:
            ReportError: the store lacks ``group``.
        """
        if group is not None and group not in names:
            known = ", ".join(sorted(names)) or "none"
            raise ReportError(
                f"report(group={group!r}): no such metadata column. The store has: {known}. HINT: "
                '`encode` gives the columns, for example Encoded(..., metadata={"owner": '
                'batch["owner"]}).'
            )
        chosen = group or _first(names, _GROUPS)
        licence, caption = _first(names, _LICENCES), _first(names, _CAPTIONS)
        first = [name for name in (chosen, licence, caption) if name is not None]
        return cls(
            names=list(dict.fromkeys([*first, *sorted(names)])),
            group=chosen,
            licence=licence,
            caption=caption,
            links=[name for name in names if name.lower() in _LINKS],
        )


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column of the first wanted name, in whatever case the store spells it."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)
