"""Prompts as a tokenizer's numbers: given ones in place of a tokenizer, and where a prompt is
cut."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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


def token_key(numbers: tuple[Tensor, ...]) -> Hashable:
    """What tells tokens from others."""
    return tuple(tuple(row.flatten().tolist()) for row in numbers)
