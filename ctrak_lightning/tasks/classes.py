"""What the class-conditional families share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.errors import ConceptError, TaskError
from ctrak_lightning.tasks.base import Condition, Spec
from ctrak_lightning.tasks.pipeline import FIELDS, Batch, PipelineTask


class ClassTask(PipelineTask):
    """A pipeline whose condition is a class. A batch has ``class``: label numbers [B], or B names;
    a concept is ``{"class": "cat"}``, by name or number.

    Args:
        pipeline, resolution, batch: as of :class:`PipelineTask`.
        classes: names of the labels 0, 1, ...; None takes the pipeline's, if it has any.
        null_class: the label that stands for no class; None takes the family's, if it has one.
    """

    fields = (*FIELDS, "class")

    def __init__(
        self,
        pipeline: Any,
        *,
        classes: Sequence[str] | None = None,
        null_class: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, **options)
        count = self.label_count()
        if classes is not None and len(classes) > count:
            raise TaskError(
                f"{type(self).__name__}(classes={len(classes)} names): the network has {count}."
            )
        named = (
            getattr(pipeline, "labels", {})
            if classes is None
            else {n: i for i, n in enumerate(classes)}
        )
        self.class_ids: dict[str, int] = {str(i): i for i in range(count)} | dict(named)
        self.null_class = null_class

    @abstractmethod
    def label_count(self) -> int:
        """How many labels the network embeds."""

    def known_attributes(self) -> dict[str, tuple[str, ...]]:
        """The names and numbers of the classes."""
        return {"class": tuple(self.class_ids)}

    def batch_condition(self, batch: Batch) -> Condition:
        column = self.column(batch, "class")
        labels = (
            column
            if isinstance(column, Tensor)
            else torch.tensor([self._label(str(c)) for c in column])
        )
        return {"class_labels": labels.to(self.device).long()}

    def condition(self, spec: Spec, n: int) -> Condition:
        """The condition of a class, or of none for ``{}``, ``n`` times.

        Raises:
            ConceptError: the spec is a prompt, names another attribute or an unknown class, or
                there is no label for no class.
        """
        if isinstance(spec, str) or set(spec) - {"class"}:
            given = spec if isinstance(spec, str) else dict(spec)
            raise ConceptError(
                f"{type(self).__name__}.condition({given!r}): expected {{'class': name}}, or {{}} "
                "for none."
            )
        label = self._label(spec["class"]) if spec else self.null_class
        if label is None:
            raise ConceptError(
                f"{type(self).__name__}.condition({{}}): the model has no label for no class. "
                "HINT: if it was trained with one, null_class=...; else trace by a method that asks "
                "for none, such as methods.influence('condition'), and ask with another class as the "
                "absent side and Sampler(guidance=1.0)."
            )
        return {"class_labels": torch.full((n,), label, device=self.device)}

    def _label(self, name: str) -> int:
        if name not in self.class_ids:
            shown = ", ".join(list(self.class_ids)[:20])
            raise ConceptError(
                f"{type(self).__name__}: unknown class {name!r}. Known: "
                f"{shown}{', ...' if len(self.class_ids) > 20 else ''}."
            )
        return self.class_ids[name]
