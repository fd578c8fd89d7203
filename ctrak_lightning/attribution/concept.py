"""Concept: what a query asks for."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctrak_lightning.errors import ConceptError
from ctrak_lightning.task import Spec


@dataclass(frozen=True, slots=True)
class Concept:
    """A concept inside a generated image: the condition that made the image, and the same with the concept taken out.

    Args:
        name: shown in results.
        present: attributes (or the prompt) the image was made with.
        absent: the same without the concept. What it does not name is dropped; ``{}`` is the null condition.
        alone: the concept and nothing else, for global queries; of attributes it is what ``absent`` lacks.

    Raises:
        ConceptError: the name is empty, or both sides are the same.

    Example:
        >>> Concept("cat", present={"object": "cat", "artist": "noto"}, absent={"artist": "noto"}).name
        'cat'
    """

    name: str
    present: Spec
    absent: Spec
    alone: Spec | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConceptError("Concept(name=''): expected a name.")
        if self.present == self.absent:
            raise ConceptError(
                f"Concept({self.name!r}): present and absent are both {self.present!r}; expected the absent side to lack "
                "the concept. HINT: absent is `present` without the concept's attribute or words."
            )

    def isolated(self) -> "Concept":
        """The concept on its own against the null condition, of which global queries generate images.

        Raises:
            ConceptError: the concept is asked by prompt and has no ``alone``.
        """
        alone = self.alone
        if alone is None:
            if isinstance(self.present, str) or isinstance(self.absent, str):
                raise ConceptError(
                    f"Concept({self.name!r}, present={self.present!r}): a global query needs the prompt of the concept alone. "
                    "HINT: Concept(..., alone='a cat')."
                )
            alone = {key: value for key, value in self.present.items() if self.absent.get(key) != value}
        return Concept(self.name, alone, "" if isinstance(alone, str) else {})

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        sides = {"present": self.present, "absent": self.absent}
        return {"name": self.name} | {k: v if isinstance(v, str) else dict(v) for k, v in sides.items()}


def check_known(concept: Concept, task: Any) -> None:
    """Holds a concept against ``task.known_attributes()``, where the task offers it.

    Raises:
        ConceptError: an attribute or a value is unknown; the message lists the known ones, nearest first.
    """
    if hasattr(task, "check_concept"):
        task.check_concept(concept.name, concept.present, concept.absent)
    if not hasattr(task, "known_attributes"):
        return
    known: Mapping[str, Any] = task.known_attributes()
    for side, spec in (("present", concept.present), ("absent", concept.absent)):
        if isinstance(spec, str):
            raise ConceptError(
                f"Concept({concept.name!r}, {side}={spec!r}): this model takes attributes, not prompts. "
                f"Expected a mapping with keys among {sorted(known)}."
            )
        for attribute, value in spec.items():
            if attribute not in known:
                raise ConceptError(
                    f"Concept({concept.name!r}, {side}={dict(spec)!r}): unknown attribute {attribute!r}. "
                    f"Known: {', '.join(sorted(known))}."
                )
            if value not in known[attribute]:
                raise ConceptError(
                    f"Concept({concept.name!r}, {side}={dict(spec)!r}): unknown {attribute} {value!r}. "
                    f"Known: {_nearest(value, list(known[attribute]))}."
                )


def _nearest(value: str, known: list[str], most: int = 20) -> str:
    near = difflib.get_close_matches(value, known, n=5, cutoff=0.5)
    listed = (near + sorted(set(known) - set(near)))[:most]
    rest = len(known) - len(listed)
    return ", ".join(listed) + (f" and {rest} more" if rest else "")
