"""What the text-to-image families share: prompts as conditions, encoded once."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctrak_lightning.errors import ConceptError
from ctrak_lightning.task.diffusers_task import FIELDS, DiffusersTask, is_trained
from ctrak_lightning.task.protocol import Condition, Spec

CACHE_BYTES = 2**28
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class PromptTask(DiffusersTask):
    """A pipeline whose condition is a prompt. A batch has ``caption``, B strings.

    The encoding of a prompt is kept (the least recently used go when they take more than ``CACHE_BYTES``), unless a text
    encoder is trained. A caption beyond the tokenizers' limit is cut, as the pipeline cuts it; a concept's prompt is refused.

    Args:
        pipeline, resolution, fields: as of :class:`DiffusersTask`.
        negative_prompt: what the null condition ``{}`` stands for, as the pipeline's argument of that name: the unconditional
            side of guidance. None is the pipeline's default, the empty prompt or zeros.
        max_sequence_length: of T5's tokens, where the pipeline has it; None takes the pipeline's default.
    """

    fields: ClassVar[tuple[str, ...]] = (*FIELDS, "caption")

    def __init__(
        self,
        pipeline: Any,
        *,
        negative_prompt: str | None = None,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, **options)
        self.negative_prompt = negative_prompt
        self._length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        self._cache: OrderedDict[str | None, Condition] = OrderedDict()

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """The network's keyword arguments for prompts, each [len(prompts), ...]."""
        raise NotImplementedError

    def encode_null(self) -> Condition:
        """The same of the unconditional side, each [1, ...]."""
        return self.encode_prompts([self.negative_prompt or ""])

    def batch_condition(self, batch: Mapping[str, Any]) -> Condition:
        return self._conditions(list(self.column(batch, "caption")))

    def condition(self, spec: Spec, n: int) -> Condition:
        """The condition of a prompt, or of the unconditional side for ``{}``, ``n`` times.

        Raises:
            ConceptError: the spec names attributes, or is a prompt too long for every tokenizer.
        """
        if not isinstance(spec, str) and spec:
            raise ConceptError(
                f"{type(self).__name__}.condition({dict(spec)!r}): this model takes prompts, not attributes. HINT: "
                "Concept('cat', present='a cat by x', absent='a picture by x')."
            )
        if isinstance(spec, str):
            self._refuse_cut(spec)
        rows = self._conditions([spec if isinstance(spec, str) else None])
        return {name: value.expand(n, *value.shape[1:]) for name, value in rows.items()}

    def _refuse_cut(self, prompt: str) -> None:
        cut = {}
        for name in TOKENIZERS:
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is None:
                continue
            limit = tokenizer.model_max_length
            if "T5" in type(tokenizer).__name__:
                limit = min(limit, self._length.get("max_sequence_length", limit))
            count = len(tokenizer(prompt, truncation=False)["input_ids"])
            if count <= limit:
                return
            cut[name] = f"{count} tokens of at most {limit}"
        raise ConceptError(
            f"{type(self).__name__}.condition({prompt!r}): the prompt would be cut, and the concept perhaps with it: {cut}. HINT: "
            "shorten it."
        )

    def _conditions(self, prompts: Sequence[str | None]) -> Condition:
        """The conditions of prompts, None being the unconditional side, one row each."""
        if any(name != "vae" and is_trained(getattr(self, name)) for name in self.parts):
            return _joined([self._encode(prompt) for prompt in prompts])
        with _always_alike(self.device):
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._cache:
                    self._cache[prompt] = self._encode(prompt)
                self._cache.move_to_end(prompt)
        rows = _joined([self._cache[prompt] for prompt in prompts])
        while len(self._cache) > 1 and _bytes(self._cache) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return {name: value.to(self.device) for name, value in rows.items()}

    def _encode(self, prompt: str | None) -> Condition:
        # One at a time: what a prompt's encoding is then depends on nothing else, to the last bit.
        encoded = self.encode_null() if prompt is None else self.encode_prompts([prompt])
        return {name: _as(value, self.dtype) for name, value in encoded.items()}


@contextmanager
def _always_alike(device: torch.device) -> Iterator[None]:
    """What is kept is the same to the last bit whoever asks first, a training step, a trace or a validation step: otherwise
    tracing would change training."""
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def _joined(conditions: Sequence[Condition]) -> Condition:
    return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _bytes(cache: OrderedDict[str | None, Condition]) -> int:
    each = next(iter(cache.values()))
    return len(cache) * sum(value.nbytes for value in each.values())
