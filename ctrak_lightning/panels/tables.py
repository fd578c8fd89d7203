"""Tables of an answer in Markdown: the ranking, the shares."""

import math
import re
from collections.abc import Sequence

from ctrak_lightning.attribution import Attribution, Record, Share
from ctrak_lightning.errors import metadata_heads
from ctrak_lightning.panels.drawing import one_line
from ctrak_lightning.panels.watch import Answer, Shown
from ctrak_lightning.tasks import Spec

CAPTION = "caption"
_LONGEST = 300


def ranking(answer: Answer, shown: Shown) -> str:
    """Markdown of what a concept's answer says: facts, proponents, opponents and shares.

    Whatever comes from the data set is inert: every character that Markdown or HTML could take for
    its own is written as a character reference.

    Args:
        answer: of the concept.
        shown: how many rows, and the shares.
    """
    group = shown.group
    title = f"### {escaped(answer.concept.name)}"
    result = answer.result
    if result is None:
        return f"{title}\n\nNo scores at this checkpoint: {escaped(answer.problem)}"
    found = result.confidence
    parts = [
        title,
        _facts(result),
        "#### Proponents",
        _records(result.top(shown.top), result, group),
    ]
    if found.says_nothing:
        parts.insert(1, " ".join([f"**{escaped(found.verdict)}**", *map(escaped, found.reasons)]))
    if shown.bottom:
        parts += ["#### Opponents", _records(result.bottom(shown.bottom), result, group)]
    if shown.shares and group is not None:
        rows = [[share.group, f"{share.share:.1%}", str(share.samples)] for share in shown.shares]
        parts += [f"#### Shares by {escaped(group)}", _table([group, "share", "samples"], rows)]
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """``text`` on one line as Markdown that shows it and does nothing; what is longer than 300
    characters is cut.

    Example:
        >>> escaped("<b>|x")
        '&#60;b&#62;&#124;x'
    """
    line = one_line(text)
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return re.sub(r"[!-+/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", line)


def _facts(result: Attribution) -> str:
    checkpoints = f"{len(result.steps)} checkpoint{'s' * (len(result.steps) > 1)}"
    facts = {
        "present": described(result.concept.present),
        "absent": described(result.concept.absent),
        "seed": str(result.seed),
        "traces": f"{checkpoints}, to step {result.steps[-1]}",
        "damping": "none" if result.damping is None else f"{result.damping:g}",
        "concept strength": "-" if math.isnan(result.strength) else f"{result.strength:.3g}",
        "effective "
        "contributors": f"{result.effective_contributors():.1f} of {len(result.samples)} samples",
    }
    return _table(list(facts), [list(facts.values())])


def _records(records: Sequence[Record], result: Attribution, group: str | None) -> str:
    known = result.samples.metadata
    columns = [
        name for name in dict.fromkeys((group, CAPTION)) if name is not None and name in known
    ]
    rows = [
        [
            str(record.rank),
            record.sample_id,
            *map(record.metadata.__getitem__, columns),
            f"{record.score:.3f}",
        ]
        for record in records
    ]
    heads = metadata_heads(columns, ["rank", "id", "score"])
    return _table(["rank", "id", *heads, "score"], rows)


def described(spec: Spec) -> str:
    """A side of a concept in words.

    Example:
        >>> described({"object": "owl", "artist": "noto"}), described({})
        ('object: owl, artist: noto', 'nothing')
    """
    text = (
        spec
        if isinstance(spec, str)
        else ", ".join(f"{key}: {value}" for key, value in spec.items())
    )
    return text or "nothing"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell if i == 1 else escaped(cell) for cell in line] for i, line in enumerate(lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


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
