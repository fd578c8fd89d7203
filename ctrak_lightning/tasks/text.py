"""What the text-to-image families share: prompts as conditions, encoded once."""

import inspect
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctrak_lightning.errors import ConceptError, TaskError
from ctrak_lightning.tasks.base import Condition, Spec
from ctrak_lightning.tasks.pipeline import FIELDS, Batch, PipelineTask, is_trained


@dataclass(frozen=True, slots=True)
class Cut:
    """A tokenizer and how many tokens of it a pipeline takes."""

    name: str
    tokenizer: Any
    limit: int

    def tokens(self, prompt: str) -> list[int]:
        """The tokens of a prompt that are left."""
        numbers: list[int] = self.tokenizer(prompt, truncation=True, max_length=self.limit)[
            "input_ids"
        ]
        return numbers

    def excess(self, prompt: str) -> str | None:
        """How much too long a prompt is, in words; None if it is not."""
        count = len(self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
        return (
            f"{self.name}: {count} tokens of at most {self.limit}" if count > self.limit else None
        )


@contextmanager
def given_tokens(pipeline: Any, tokens: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the pipeline's tokenizers give these numbers [1, n], whatever they are asked, so that
    the pipeline's own way from tokens to embeddings is taken."""
    own = {name: vars(pipeline).get(name) for name in tokens}
    try:
        for name, numbers in tokens.items():
            # Not by assignment, of which a pipeline makes a note in its configuration.
            vars(pipeline)[name] = _Given(numbers, own[name])
        yield
    finally:
        vars(pipeline).update(own)


class _Given:
    """What a pipeline needs of a tokenizer."""

    def __init__(self, numbers: Tensor, tokenizer: Any) -> None:
        self.input_ids = numbers
        self.model_max_length = numbers.shape[1]
        padding = getattr(
            tokenizer, "pad_token_id", 0
        )  # T5's, the only one whose mask is used, is 0
        self.attention_mask = (numbers != padding).long()

    def __call__(self, *args: Any, **options: Any) -> "_Given":
        return self

    def tokenize(self, prompt: str) -> list[str]:
        return []


CACHE_BYTES = 2**28
TOKENS = ("tokens", "tokens_2", "tokens_3")
_SUFFIXES = ("", "_2", "_3")
Given = tuple[Tensor, ...]


class PromptTask(PipelineTask):
    """A pipeline whose condition is a prompt. A batch has ``caption``, B strings; or token numbers,
    ``tokens`` [B, n] of the first tokenizer and ``tokens_2``, ``tokens_3`` of the others; or what
    the text encoders made of them before, ``prompt_embeds`` [B, n, d] and, where the family has it,
    ``pooled_prompt_embeds`` or ``prompt_attention_mask``.

    The encoding of a prompt is kept (the least recently used go when they take more than
    ``CACHE_BYTES``), unless a text encoder is trained. A prompt beyond the tokenizers' limit is
    cut, as the pipeline cuts it; a concept of which then nothing is left is refused.

    Args:
        pipeline, resolution, batch, owns_parts: as of :class:`PipelineTask`.
        negative_prompt: what the null condition ``{}`` stands for, as the pipeline's argument of
            that name: the unconditional side of guidance. None is the pipeline's default, the empty
            prompt or zeros.
        max_sequence_length: of T5's tokens, where the pipeline has it; None takes the pipeline's
            default.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    fields: ClassVar[tuple[str, ...]] = (*FIELDS, "caption", *TOKENS[:1], *embeddings)

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
        self._length = (
            {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        )
        self._cache: OrderedDict[Hashable, Condition] = OrderedDict()
        self._cached_in: list[torch.dtype] = []

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """The network's keyword arguments for prompts, each [len(prompts), ...]."""
        return self.conditioned(*self.embed(prompts))

    @abstractmethod
    def embed(self, prompts: list[str]) -> Given:
        """What the text encoders make of prompts: the columns of ``embeddings``."""

    @abstractmethod
    def conditioned(self, *embeddings: Tensor) -> Condition:
        """The network's keyword arguments for what the text encoders made."""

    def encode_null(self) -> Condition:
        """The same of the unconditional side, each [1, ...]."""
        return self.encode_prompts([self.negative_prompt or ""])

    def batch_condition(self, batch: Batch) -> Condition:
        if self.has_column(batch, "prompt_embeds"):
            given = (self.column(batch, name).to(self.device) for name in self.embeddings)
            return {n: _as(value, self.dtype) for n, value in self.conditioned(*given).items()}
        if self.has_column(batch, "tokens"):
            columns = [self.column(batch, TOKENS[i]).to(self.device) for i in self._encoders()]
            return self._conditions(
                [tuple(row[None] for row in rows) for rows in zip(*columns, strict=True)]
            )
        return self._conditions(list(self.column(batch, "caption")))

    def condition(self, spec: Spec, n: int) -> Condition:
        """The condition of a prompt, or of the unconditional side for ``{}``, ``n`` times.

        Raises:
            ConceptError: the spec names attributes.
        """
        if not isinstance(spec, str) and spec:
            raise ConceptError(
                f"{type(self).__name__}.condition({dict(spec)!r}): this model takes prompts, not "
                "attributes. HINT: Concept('cat', present='a cat by x', absent='a picture by x')."
            )
        rows = self._conditions([spec if isinstance(spec, str) else None])
        return {name: value.expand(n, *value.shape[1:]) for name, value in rows.items()}

    def check_concept(self, name: str, present: Spec, absent: Spec) -> None:
        """Holds a concept's prompts against the tokenizers' limits.

        Raises:
            ConceptError: every tokenizer cuts both sides to the same tokens: the concept is cut
                away.

        Warns:
            UserWarning: a prompt is cut, but what is left of it still differs from the other side.
        """
        sides = [side for side in (present, absent) if isinstance(side, str)]
        cuts = list(self._tokenizers())
        excess = {
            prompt: found
            for prompt in sides
            if all(found := [cut.excess(prompt) for cut in cuts]) and found
        }
        if not excess:
            return
        if len(sides) == 2 and all(cut.tokens(sides[0]) == cut.tokens(sides[1]) for cut in cuts):
            raise ConceptError(
                f"Concept({name!r}): the tokenizers cut both prompts to the same text, so the "
                f"concept was cut away: {excess}. HINT: name the concept earlier in the prompt, or "
                "shorten it."
            )
        warnings.warn(
            f"Concept({name!r}): the tokenizers cut {excess}, as the pipeline would; what comes "
            "after that is not asked. HINT: shorten the prompt.",
            UserWarning,
            stacklevel=2,
        )

    def _tokenizers(self) -> Iterator[Cut]:
        """Those there are."""
        for suffix in _SUFFIXES:
            tokenizer = getattr(self.pipeline, f"tokenizer{suffix}", None)
            if tokenizer is None:
                continue
            limit = tokenizer.model_max_length
            if "T5" in type(tokenizer).__name__:
                length = inspect.signature(self.pipeline.encode_prompt).parameters[
                    "max_sequence_length"
                ]
                limit = min(limit, self._length.get("max_sequence_length", length.default))
            yield Cut(f"tokenizer{suffix}", tokenizer, limit)

    def _encoders(self) -> list[int]:
        """Which of the three text encoders there are."""
        return [i for i, suffix in enumerate(_SUFFIXES) if f"text_encoder{suffix}" in self.parts]

    def _conditions(self, prompts: Sequence[str | Given | None]) -> Condition:
        """The conditions of prompts or their tokens, None being the unconditional side, one row
        each."""
        if any(name != "vae" and is_trained(getattr(self, name)) for name in self.parts):
            return _joined([self._encode(prompt) for prompt in prompts])
        # A text encoder may have no parameters of its own, such as one that calls another library.
        weights = [next(getattr(self, name).parameters(), None) for name in self.parts]
        dtypes = [self.dtype, *(weight.dtype for weight in weights if weight is not None)]
        if dtypes != self._cached_in:  # the module was converted since
            self._cache.clear()
            self._cached_in = dtypes
        keys = [
            tuple(tuple(row.flatten().tolist()) for row in prompt)
            if isinstance(prompt, tuple)
            else prompt
            for prompt in prompts
        ]
        with _always_alike(self.device):
            for key, prompt in dict(zip(keys, prompts, strict=True)).items():
                if key not in self._cache:
                    self._cache[key] = self._encode(prompt)
                self._cache.move_to_end(key)
        rows = _joined([self._cache[key] for key in keys])
        while len(self._cache) > 1 and _bytes(self._cache) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return {name: value.to(self.device) for name, value in rows.items()}

    def _encode(self, prompt: str | Given | None) -> Condition:
        # One at a time: what a prompt's encoding is then depends on nothing else, to the last bit.
        encoders = [f"text_encoder{suffix}" for suffix in _SUFFIXES]
        with self.in_evaluation(*encoders):
            if isinstance(prompt, tuple):
                pairs = zip(self._encoders(), prompt, strict=True)
                tokens = {f"tokenizer{_SUFFIXES[i]}": numbers for i, numbers in pairs}
                with given_tokens(self.pipeline, tokens):
                    encoded = self.encode_prompts([""])
            else:
                self._require_tokenizers()
                encoded = self.encode_null() if prompt is None else self.encode_prompts([prompt])
        return {name: _as(value, self.dtype) for name, value in encoded.items()}

    def _require_tokenizers(self) -> None:
        wanted = [
            name for name in (*self.frozen_parts, *self.parts) if name.startswith("text_encoder")
        ]
        pairs = [
            name for part in wanted for name in (part, part.replace("text_encoder", "tokenizer"))
        ]
        missing = sorted({name for name in pairs if getattr(self.pipeline, name, None) is None})
        if missing:
            raise TaskError(
                f"{type(self).__name__}: a prompt cannot be encoded without {', '.join(missing)}. "
                f"HINT: DiffusersTask({missing[0]}='the attribute of the module that holds it')."
            )


@contextmanager
def _always_alike(device: torch.device) -> Iterator[None]:
    """What is kept is the same to the last bit whoever asks first, a training step, a trace or a
    validation step: otherwise tracing would change training."""
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


def _bytes(cache: OrderedDict[Hashable, Condition]) -> int:
    each = next(iter(cache.values()))
    return len(cache) * sum(value.nbytes for value in each.values())
