"""What is asked of the fine-tune: the two concepts of every held-out pair, in words; and rankings without gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrak_lightning import Concept
from recipes.emoji_artists import evaluate
from recipes.emoji_artists.data import KINDS
from recipes.emoji_text.captions import ARTIST_ONLY, BOTH, OBJECT_ONLY, caption, words
from recipes.emoji_text.pipeline import MAX_TOKENS
from recipes.text import read_text


@dataclass(frozen=True)
class Question(evaluate.Question):
    """A held-out pair, as the prompt that draws it, and one of its two concepts."""

    @property
    def group(self) -> str:
        """The kind of question, as tables name it."""
        return self.kind

    @property
    def asked(self) -> str:
        """The concept's words."""
        return words(self.value)

    @property
    def prompt(self) -> str:
        return caption(BOTH[0], self.object, self.artist)

    def concept(self) -> Concept:
        """The prompt against the prompt without the concept's words; alone it is a caption that training shows."""
        template = OBJECT_ONLY[0] if self.kind == "object" else ARTIST_ONLY[0]
        alone = caption(template, self.asked, self.asked)
        return Concept.from_prompt(self.prompt, self.asked, alone=alone)


def questions(pairs: Sequence[tuple[str, str]]) -> list[Question]:
    """Both concepts of every held-out pair, the pair's two next to each other."""
    return [Question(name, artist, kind) for name, artist in pairs for kind in KINDS]


def relevant(asked: Sequence[Question], pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Which training images show the concept, bool [Q, N]; truth, not words."""
    return torch.tensor([[pair[KINDS.index(q.kind)] == q.value for pair in pairs] for q in asked])


def exact_words(asked: Sequence[Question], captions: Sequence[str]) -> Tensor:
    """1 where a caption holds the concept's words as whole words [Q, N], else 0. ("noto" is in "noto v1" too.)"""
    return torch.tensor(
        [[float(f" {q.asked} " in f" {text.replace(',', ' ')} ") for text in captions] for q in asked]
    )


@torch.no_grad()
def sentence_vectors(texts: Sequence[str]) -> Tensor:
    """MiniLM's sentence embeddings [n, 384] of unit norm: the mean of the words' states, as it was trained to be used."""
    tokenizer, encoder = read_text(MAX_TOKENS)
    vectors = []
    for start in range(0, len(texts), 64):
        tokens = tokenizer(list(texts[start : start + 64]), padding=True, return_tensors="pt")
        states, mask = encoder(**tokens)[0], tokens["attention_mask"].unsqueeze(-1)
        vectors.append((states * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(vectors), dim=1)


REWORDED = "object in other words"
OTHER_WORDS = {
    "alembic": "distillation flask",
    "bellhop-bell": "reception ringer",
    "christmas-tree": "noel fir",
    "circus-tent": "big top",
    "clutch-bag": "purse",
    "cooked-rice": "steamed grain dish",
    "deer": "stag",
    "fire": "flame",
    "french-fries": "fried chips",
    "funeral-urn": "vase of ashes",
    "glass-of-milk": "cup of dairy",
    "jack-o-lantern": "carved halloween pumpkin",
    "koala": "australian marsupial",
    "lipstick": "lip makeup",
    "mushroom": "toadstool",
    "package": "cardboard parcel",
    "palm-tree": "coconut plant",
    "pool-8-ball": "billiards sphere",
    "rabbit": "bunny",
    "roller-coaster": "amusement ride",
    "shamrock": "irish trefoil",
    "statue-of-liberty": "new york monument",
    "studio-microphone": "recording mic",
    "tangerine": "mandarin citrus",
    "top-hat": "magician headwear",
}
"""What some of the new objects are called in words that no caption used; the images still are of the words above."""


@dataclass(frozen=True)
class Reworded(Question):
    """The object of a held-out pair, asked in other words."""

    @property
    def group(self) -> str:
        return REWORDED

    @property
    def asked(self) -> str:
        return OTHER_WORDS[self.object]

    @property
    def prompt(self) -> str:
        return caption(BOTH[0], self.asked, self.artist)


def reworded(pairs: Sequence[tuple[str, str]]) -> list[Question]:
    """The objects of the held-out pairs in other words, where there are some."""
    return [Reworded(name, artist, "object") for name, artist in pairs if name in OTHER_WORDS]
