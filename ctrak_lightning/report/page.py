"""Writes the page."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ctrak_lightning.attribution.baselines import image_similarity
from ctrak_lightning.attribution.concept import Concept
from ctrak_lightning.attribution.diagnostics import BLIND, INDISTINCT, STILL, UNSTABLE, Confidence
from ctrak_lightning.attribution.result import Attribution
from ctrak_lightning.capture.trace import FAINT
from ctrak_lightning.errors import CorruptStoreError, ReportError, StoreError
from ctrak_lightning.methods.objectives import Residual
from ctrak_lightning.provenance import ledger_summary
from ctrak_lightning.report.content import (
    BEST,
    LOWEST,
    PICTURED_BEST,
    PICTURED_LOWEST,
    Columns,
    Ranking,
    Thumbnails,
    damping_text,
    link,
    page_data,
    ranking,
    shown,
    spec_text,
)
from ctrak_lightning.report.figures import (
    Bars,
    LineChart,
    ShareRow,
    best_timeline,
    group_timeline,
    part_bars,
    share_rows,
)
from ctrak_lightning.store.facts import provenance_facts
from ctrak_lightning.store.files import write_atomically
from ctrak_lightning.utilities.images import png_uri

GENERATED = 768
"""Longest side, in pixels, of the image that is asked about."""
CARDS, OPPONENTS, ALIKE = 12, 6, 6
LIKENESS = ("concept_trak", "concept_trak_norm")
"""Methods that were held against retraining beside a search by label and likeness."""
SHARES = 15
"""Groups with a row of their own; the others are summed up in one sentence."""
PARTS_OF = 20
"""Best-ranked samples, at most, whose scores the charts of timesteps and layers split."""
_CHARTED_GROUPS = 5


@dataclass(frozen=True, slots=True)
class Card:
    """A sample as the page shows it without the script; ``bar`` is its score in percent of the
    largest, without sign."""

    row: int
    rank: int
    sample_id: str
    score: float
    bar: float
    picture: str | None
    values: list[tuple[str, str, str | None]]


@dataclass(frozen=True, slots=True)
class Section:
    """All that the page shows of one concept."""

    name: str
    present: str
    absent: str
    masked: float | None
    rows: Ranking
    cards: list[Card]
    opponents: list[Card]
    alike: list[Card]
    alike_best: int
    shares: list[ShareRow]
    other_groups: int
    other_share: float
    timeline: LineChart | None
    group_timeline: LineChart | None
    parts: tuple[Bars, Bars] | None
    parts_of: int
    has_parts: bool
    confidence: Confidence
    damping: float | None


def write_report(
    path: str | Path,
    attributions: Attribution | Sequence[Attribution],
    *,
    group: str | None = None,
) -> None:
    """Writes one self-contained HTML page about one or several concepts of one image, generated or
    given, or of none.

    It needs no network and no other file. Whatever comes from the data set is shown as text only.

    Args:
        path: of the file, replaced if it exists.
        attributions: of the same image, by the same store and method.
        group: the metadata column whose values share out the concepts; by default ``owner``, else
            ``artist``, else none.

    Raises:
        ReportError: nothing to report, results of different images or stores, no such column, or the
            file cannot be written.
        CorruptStoreError: the store is damaged.
    """
    several = [attributions] if isinstance(attributions, Attribution) else list(attributions)
    _check_alike(several)
    check_path(path)
    text = _render(several, Columns.of(list(several[0].samples.metadata), group))

    def fill(new: Path) -> None:
        new.write_text(text, encoding="utf-8", newline="\n")

    try:
        write_atomically(Path(path), fill)
    except StoreError as error:
        raise ReportError(
            f"{path} cannot be written ({error.__cause__}). HINT: name a file in a folder that "
            "exists and that this user may write to."
        ) from error


def check_path(path: str | Path) -> None:
    """Refuses a path that :func:`write_report` could not write to, before the work.

    Raises:
        ReportError: the path is a folder, or its folder does not exist or is not this user's to
            write to.
    """
    path = Path(path)
    if path.is_dir():
        raise ReportError(
            f"{path} is a folder; expected the path of a file. HINT: {path / 'report.html'}."
        )
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ReportError(
            f"{path} cannot be written: {path.parent} is no folder that this user may write to. "
            "HINT: make it, or name another."
        )


def _render(attributions: Sequence[Attribution], columns: Columns) -> str:
    first = attributions[0]
    thumbnails = Thumbnails(first.samples.thumbnails)
    rankings = [ranking(attribution) for attribution in attributions]
    sections = [
        _section(attribution, rows, columns, thumbnails)
        for attribution, rows in zip(attributions, rankings, strict=True)
    ]
    environment = Environment(
        loader=PackageLoader(__package__, "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["shown"] = shown
    style, script = _asset("report.css"), _asset("report.js")
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=page_data(attributions, rankings, columns, thumbnails),
        sections=sections,
        columns=columns,
        image=None if first.image is None else png_uri(first.image, GENERATED),
        asked_of=first.concept.kind,
        is_small=first.image is not None and max(first.image.shape[-2:]) <= 128,
        has_thumbnails=first.samples.thumbnails is not None,
        prompt=spec_text(_sides(first.concept).present),
        seed=first.seed,
        samples=len(first.samples),
        untrained=int(first.untrained.sum()),
        knows_exposures=first.exposures is not None,
        per_exposure=bool(first.method.get("per_exposure")),
        steps=first.steps,
        method=first.method,
        damping_text=damping_text(first.method["damping"]),
        thresholds={
            "faint": FAINT,
            "blind": BLIND,
            "still": STILL,
            "unstable": UNSTABLE,
            "indistinct": INDISTINCT,
        },
        weighted=first.weights is not None,
        asks_influence=_asks_influence(first.method),
        finds_likeness=first.method["name"] in LIKENESS,
        facts=_facts(first),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        limits={
            "best": BEST,
            "lowest": LOWEST,
            "pictured_best": PICTURED_BEST,
            "pictured_lowest": PICTURED_LOWEST,
        },
    )


def _section(
    attribution: Attribution, rows: Ranking, columns: Columns, thumbnails: Thumbnails
) -> Section:
    scores = attribution.scores
    largest = float(scores.abs().max()) or 1.0

    def card(row: int) -> Card:
        sample = rows.samples[row]
        metadata = attribution.samples.metadata_of(sample)
        names = [
            name
            for name in (columns.group, columns.licence, columns.caption, *columns.links)
            if name
        ]
        return Card(
            row,
            rows.ranks[row],
            shown(attribution.samples.sample_ids[sample]),
            float(scores[sample]),
            round(100 * abs(float(scores[sample])) / largest, 1),
            thumbnails.uri(sample),
            [
                (
                    name,
                    shown(metadata[name], 120),
                    link(metadata[name]) if name in columns.links else None,
                )
                for name in dict.fromkeys(names)
            ],
        )

    held = range(len(rows.samples))
    best = [row for row in held[:CARDS] if scores[rows.samples[row]] > 0]
    untrained = attribution.untrained
    trained = [row for row in held if not untrained[rows.samples[row]]]
    lowest = [row for row in trained[: -OPPONENTS - 1 : -1] if scores[rows.samples[row]] < 0]
    alike = _alike(attribution, rows)
    positive = bool((scores > 0).any())
    # What a page shows is paid by: a share that says nothing is withheld rather than struck out,
    # for numbers get copied.
    nothing = attribution.confidence.says_nothing
    shares = (
        share_rows(attribution, columns.group) if columns.group and positive and not nothing else []
    )
    charted = [row.share.group for row in shares[:_CHARTED_GROUPS]]
    parts = None
    leading = [sample for sample in rows.samples[:PARTS_OF] if scores[sample] > 0]
    if attribution.parts is not None and leading:
        parts = part_bars(attribution.parts, scores, leading)
    return Section(
        name=shown(attribution.concept.name, 200),
        present=spec_text(_sides(attribution.concept).present),
        absent=spec_text(_sides(attribution.concept).absent),
        masked=None
        if attribution.concept.mask is None
        else float(attribution.concept.mask.float().mean()),
        rows=rows,
        cards=[card(row) for row in best],
        opponents=[card(row) for row in lowest],
        alike=[card(row) for row in alike],
        alike_best=sum(
            bool(rows.ranks[row] <= ALIKE and scores[rows.samples[row]] > 0) for row in alike
        ),
        shares=shares[:SHARES],
        other_groups=len(shares[SHARES:]),
        other_share=sum(row.share.share for row in shares[SHARES:]),
        timeline=best_timeline(attribution),
        group_timeline=group_timeline(attribution, columns.group, charted)
        if columns.group and charted
        else None,
        parts=parts,
        parts_of=len(leading),
        has_parts=attribution.parts is not None,
        confidence=attribution.confidence,
        damping=attribution.damping,
    )


def _asks_influence(method: Mapping[str, Any]) -> bool:
    """Whether a method, as a store records it, asks what training on a sample changed: by the
    residual that it left."""
    objective = method["training"]["objective"]
    return bool(objective["class"] == Residual.__name__)


def _alike(attribution: Attribution, rows: Ranking) -> list[int]:
    """The rows whose thumbnails are nearest to the image that is asked about, pixel by pixel; none
    where there is no image, or there are no thumbnails."""
    image, thumbnails = attribution.image, attribution.samples.thumbnails
    if image is None or thumbnails is None or not thumbnails.numel():
        return []
    likeness = image_similarity(image[None], thumbnails[rows.samples].permute(0, 3, 1, 2))[0]
    return likeness.argsort(descending=True, stable=True)[:ALIKE].tolist()


def _facts(attribution: Attribution) -> dict[str, str]:
    if attribution.store is None:
        return {}
    facts = provenance_facts(attribution.store)
    try:
        facts |= {
            f"ledger: {name.lower()}": value
            for name, value in ledger_summary(attribution.store).items()
        }
    except CorruptStoreError as error:
        facts["ledger"] = f"damaged, so that it shows nothing: {error}"
    return {shown(name): shown(value) for name, value in facts.items()}


def _check_alike(attributions: Sequence[Attribution]) -> None:
    if not attributions:
        raise ReportError("write_report([]): expected at least one attribution.")
    for each in attributions:
        bad = int((~each.scores.isfinite()).sum()) if each.steps else len(each.samples)
        if bad:
            raise ReportError(
                f"write_report: {each.concept.name!r} has {len(each.steps)} checkpoints and {bad} "
                f"of {len(each.samples)} scores that are no finite number; expected at least one "
                "checkpoint, and finite scores. HINT: ctrak info STORE --verify."
            )
    first = attributions[0]
    for other in attributions[1:]:
        pairs: dict[str, tuple[Any, Any]] = {
            "image": (_of_image(first.concept), _of_image(other.concept)),
            "present": (first.concept.present, other.concept.present),
            "seed": (first.seed, other.seed),
            "steps": (first.steps, other.steps),
            "method": (first.method, other.method),
            "samples": (first.samples.sample_ids, other.samples.sample_ids),
        }
        for field, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise ReportError(
                    f"write_report: {first.concept.name!r} and {other.concept.name!r} have another "
                    f"{field}; expected concepts of one generated image, asked of one store. HINT: "
                    "a page for each image, or Attributor.attribute_many([...], seed) with the "
                    "same `present`."
                )


def _of_image(concept: Concept) -> Any:
    """Equal of concepts of one image."""
    return concept.name if concept.image is None else concept.to_dict().get("image")


def _sides(concept: Concept) -> Concept:
    """The two conditions that were asked."""
    return concept.isolated() if concept.image is None else concept


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
