"""Concept: what a query asks for."""

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ctrak_lightning.attribution.counter_prompt import counter_prompt, near_words, occurrences
from ctrak_lightning.attribution.counter_prompt import words as words_of
from ctrak_lightning.errors import ConceptError, nearest
from ctrak_lightning.tasks import DiffusionTask, Spec, whole


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Concept:
    """A concept inside an image: the condition that stands for the image, and the same with the
    concept taken out.

    Args:
        name: shown in results.
        present: attributes (or the prompt) the image was made with.
        absent: the same without the concept. What it does not name is dropped; ``{}`` is the null
            condition.
        alone: the concept and nothing else, for global queries; of attributes it is what ``absent``
            lacks.
        image: which image is asked about: ``"generated"``, made from ``present`` with a seed; a
            tensor [3, H, W] in [-1, 1], an image that exists; or None, no image but the model's own
            distribution (a global query).
        mask: the part of the image that the question is about [H, W], bool or 0 to 1; None is all
            of it.

    Raises:
        ConceptError: the name is empty, both sides are the same, or an image or a mask is not as it
            should be.

    Example:
        >>> Concept("cat", present={"object": "cat", "artist": "noto"}, absent={"artist": "noto"}).name
        'cat'
        >>> print(Concept.from_prompt("Pikachu in the style of Picasso", "Pikachu"))
        Pikachu: "Pikachu in the style of Picasso" without it: "a picture in the style of Picasso"
    """

    name: str
    present: Spec
    absent: Spec
    alone: Spec | None = None
    _: KW_ONLY
    image: Tensor | Literal["generated"] | None = "generated"
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConceptError("Concept(name=''): expected a name.")
        if self.present == self.absent:
            raise ConceptError(
                f"Concept({self.name!r}): present and absent are both {self.present!r}; expected "
                "the absent side to lack the concept. HINT: absent is `present` without the "
                "concept's attribute or words."
            )
        self._check_image()
        self._check_mask()

    @classmethod
    def from_prompt(
        cls,
        prompt: str,
        concept: str,
        *,
        absent: str | None = None,
        alone: str | None = None,
        **rest: Any,
    ) -> "Concept":
        """A concept that a prompt names: ``present`` is the prompt, ``absent`` the prompt without
        the concept's words (:func:`~ctrak_lightning.attribution.counter_prompt.counter_prompt`, by rules
        for English). Look at both: ``print(concept)``.

        Args:
            prompt: the prompt.
            concept: words of it; whole words, whatever the case, in the singular or plural. All
                their places count.
            absent: another counter-prompt than by the rules.
            alone: the prompt of the concept alone; by default its words.
            rest: ``name`` (by default the concept's words), ``image``, ``mask``.

        Raises:
            ConceptError: the prompt is empty, the concept is not in it, or nothing is left without
                it.
        """
        prompt, words = " ".join(prompt.split()), " ".join(concept.split())
        called = f"Concept.from_prompt({prompt!r}, {words!r})"
        if not words_of(prompt) or not words_of(words):
            raise ConceptError(f"{called}: expected a prompt, and words of it as the concept.")
        if not occurrences(prompt, words):
            raise ConceptError(
                f"{called}: the concept is not in the prompt. Its words: "
                f"{', '.join(near_words(prompt, words))}. HINT: expected whole words as they stand "
                "there, next to each other."
            )
        if absent is None:
            absent = counter_prompt(prompt, words)
            if not absent:
                raise ConceptError(
                    f"{called}: without the concept nothing is left of the prompt. HINT: give the "
                    "counter-prompt, absent='a picture', or a longer prompt."
                )
        return cls(
            rest.pop("name", words), prompt, absent, words if alone is None else alone, **rest
        )

    @classmethod
    def split(cls, prompt: str, concepts: Sequence[str], **rest: Any) -> "list[Concept]":
        """One concept for each part of a prompt; each absent side lacks that part only.

        Args:
            prompt: the prompt.
            concepts: parts of it.
            rest: ``image`` and ``mask``, the same for all.

        Raises:
            ConceptError: as :meth:`from_prompt`; or no part is named, or two overlap.

        Example:
            >>> for concept in Concept.split("Pikachu in the style of Picasso", ["Pikachu", "Picasso"]):
            ...     print(concept.absent)
            a picture in the style of Picasso
            Pikachu
        """
        if not concepts or isinstance(concepts, str):
            raise ConceptError(
                f"Concept.split({prompt!r}, {concepts!r}): expected a list of parts of the prompt."
            )
        places = {concept: occurrences(prompt, concept) for concept in concepts}
        longest = sorted(concepts, key=lambda concept: -len(concept))
        for i, one in enumerate(longest):
            for other in longest[i + 1 :]:
                if any(a < d and c < b for a, b in places[one] for c, d in places[other]):
                    raise ConceptError(
                        f"Concept.split({prompt!r}): {one!r} and {other!r} overlap; expected parts "
                        "that share no word. HINT: leave one out, or ask them one by one with "
                        "from_prompt."
                    )
        return [cls.from_prompt(prompt, concept, **rest) for concept in concepts]

    @property
    def kind(self) -> Literal["generated", "given", "global"]:
        """Which image is asked about: one to generate, one that exists, or none."""
        if self.image is None:
            return "global"
        return "given" if isinstance(self.image, Tensor) else "generated"

    def isolated(self) -> "Concept":
        """The concept on its own against the null condition, of which global queries generate
        images.

        Raises:
            ConceptError: the concept is asked by prompt and has no ``alone``.
        """
        alone = self.alone
        if alone is None:
            if isinstance(self.present, str) or isinstance(self.absent, str):
                raise ConceptError(
                    f"Concept({self.name!r}, present={self.present!r}): a global query needs the "
                    "prompt of the concept alone. HINT: Concept(..., alone='a cat')."
                )
            alone = {
                key: value for key, value in self.present.items() if self.absent.get(key) != value
            }
        return Concept(self.name, alone, "" if isinstance(alone, str) else {})

    def to_dict(self) -> dict[str, Any]:
        """JSON values: both sides; of a given image and of a mask the shape and sha256, not the
        content."""
        sides = {"present": self.present, "absent": self.absent}
        facts: dict[str, Any] = {"name": self.name} | {
            side: _plain(spec) for side, spec in sides.items()
        }
        if self.image is None:
            facts |= {"image": None, "alone": _plain(self.isolated().present)}
        if isinstance(self.image, Tensor):
            facts["image"] = _digest(self.image)
        if self.mask is not None:
            facts["mask"] = _digest(self.mask)
        return facts

    def __str__(self) -> str:
        if self.image is None:
            return f"{self.name}, in general: {_quoted(self.isolated().present)}"
        return f"{self.name}: {_quoted(self.present)} without it: {_quoted(self.absent)}"

    def __repr__(self) -> str:
        asked = "" if self.image == "generated" else f", image={_shown(self.image)}"
        asked += "" if self.mask is None else f", mask={_shown(self.mask)}"
        alone = "" if self.alone is None else f", alone={self.alone!r}"
        return (
            f"Concept({self.name!r}, present={self.present!r}, "
            f"absent={self.absent!r}{alone}{asked})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Concept):
            return NotImplemented
        return self._facts() == other._facts() and all(
            torch.equal(mine, theirs)
            if isinstance(mine, Tensor) and isinstance(theirs, Tensor)
            else mine is theirs
            for mine, theirs in ((self.image, other.image), (self.mask, other.mask))
            if isinstance(mine, Tensor) or isinstance(theirs, Tensor)
        )

    def __hash__(self) -> int:
        return hash(self.name)

    def _facts(self) -> tuple[Any, ...]:
        image = "given" if isinstance(self.image, Tensor) else self.image
        return self.name, self.present, self.absent, self.alone, image

    def _check_image(self) -> None:
        image = self.image
        if image is None:
            self.isolated()
            return
        if image == "generated" if isinstance(image, str) else _is_picture(image):
            return
        raise ConceptError(
            f"Concept({self.name!r}, image={_shown(image)}): expected 'generated', None (a global "
            "query), or an image [3, H, W] with values in [-1, 1]. HINT: pixels / 127.5 - 1 of "
            "8-bit pixels."
        )

    def _check_mask(self) -> None:
        mask = self.mask
        if mask is None:
            return
        problem = None
        if self.image is None:
            problem = "a global query is about no one image, so that it has no parts"
        elif not isinstance(mask, Tensor) or mask.ndim != 2:
            problem = "expected a tensor [H, W]"
        elif isinstance(self.image, Tensor) and mask.shape != self.image.shape[1:]:
            problem = f"the image has {list(self.image.shape[1:])} pixels; expected as many"
        elif not bool(mask.isfinite().all()) or float(mask.min()) < 0 or float(mask.max()) > 1:
            problem = "expected values between 0 and 1"
        elif not bool(mask.any()):
            problem = "it is zero everywhere; expected a part of the image"
        if problem:
            raise ConceptError(
                f"Concept({self.name!r}, mask={_shown(mask)}): {problem}. HINT: mask=None asks "
                "about all of the image."
            )


def _is_picture(image: Any) -> bool:
    if (
        not isinstance(image, Tensor)
        or image.ndim != 3
        or not image.is_floating_point()
        or image.numel() == 0
    ):
        return False
    return (
        image.shape[0] in (1, 3)
        and bool(image.isfinite().all())
        and float(image.abs().max()) <= 1 + 1e-3
    )


def _plain(spec: Spec) -> str | dict[str, str]:
    return spec if isinstance(spec, str) else dict(spec)


def _quoted(spec: Spec) -> str:
    if isinstance(spec, str):
        return f'"{spec}"'
    return (
        ", ".join(f"{key}={value}" for key, value in spec.items()) or "nothing (the null condition)"
    )


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _digest(tensor: Tensor) -> dict[str, Any]:
    """Shape, and the sha256 of the values as little-endian float32."""
    content = tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
    return {"shape": list(tensor.shape), "sha256": hashlib.sha256(content).hexdigest()}


def check_known(concept: Concept, task: DiffusionTask) -> None:
    """Holds a concept against ``task.known_attributes()``, where the task offers it.

    Raises:
        ConceptError: an attribute or a value is unknown; the message lists the known ones, nearest
            first.
    """
    task = whole(task)
    task.check_concept(concept.name, concept.present, concept.absent)
    known = task.known_attributes()
    if known is None:
        return
    for side, spec in (("present", concept.present), ("absent", concept.absent)):
        if isinstance(spec, str):
            raise ConceptError(
                f"Concept({concept.name!r}, {side}={spec!r}): this model takes attributes, not "
                f"prompts. Expected a mapping with keys among {sorted(known)}."
            )
        for attribute, value in spec.items():
            if attribute not in known:
                raise ConceptError(
                    f"Concept({concept.name!r}, {side}={dict(spec)!r}): unknown attribute "
                    f"{attribute!r}. Known: {', '.join(sorted(known))}."
                )
            if value not in known[attribute]:
                raise ConceptError(
                    f"Concept({concept.name!r}, {side}={dict(spec)!r}): unknown {attribute} "
                    f"{value!r}. Known: {nearest(value, sorted(known[attribute]))}."
                )
