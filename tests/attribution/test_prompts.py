"""Prompts taken apart: words, counter-prompts, and the concepts made of them."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrak_lightning import Concept
from ctrak_lightning.attribution.counter_prompt import (
    ARTICLES,
    CONJUNCTIONS,
    PREPOSITIONS,
    counter_prompt,
    occurrences,
    words,
)
from ctrak_lightning.errors import ConceptError

COUNTER_PROMPTS = [
    # A subject that is lost, and what led to a name.
    ("Pikachu in the style of Picasso", "Pikachu", "a picture in the style of Picasso"),
    ("Pikachu in the style of Picasso", "picasso", "Pikachu"),
    ("a cat, flat vector style by noto", "cat", "a picture, flat vector style by noto"),
    ("a cat, flat vector style by noto", "noto", "a cat, flat vector style"),
    ("the Eiffel Tower at night", "Eiffel Tower", "a picture at night"),
    ("a cat by x", "cat", "a picture by x"),
    ("a cat painted by Picasso", "Picasso", "a cat"),
    ("in the style of Picasso, a cat", "Picasso", "a cat"),
    ("Pikachu, electric, masterpiece", "Pikachu", "electric, masterpiece"),
    ("masterpiece, Pikachu, 4k", "Pikachu", "masterpiece, 4k"),
    # In the middle, and at the end.
    ("a photo of a cat", "cat", "a photo"),
    ("a photo of my cat on a beach", "cat", "a photo on a beach"),
    ("a dog with a hat", "hat", "a dog"),
    ("a painting (Pikachu) by X", "Pikachu", "a painting by X"),
    ("oil on canvas. Pikachu.", "Pikachu", "oil on canvas."),
    # Words that told more of another, and a/an.
    ("a red apple on a table", "red", "an apple on a table"),
    ("An old bar", "old", "A bar"),
    ("a Picasso painting of a cat", "Picasso", "a painting of a cat"),
    # Nouns that were told more of, and what verbs were about.
    ("a cute cat in the garden", "cat", "a cute thing in the garden"),
    ("a girl riding Pikachu", "Pikachu", "a girl riding something"),
    ("a photo of a cat wearing a hat", "cat", "a photo of something wearing a hat"),
    ("a cat is sleeping", "cat", "something is sleeping"),
    ("an oil painting in Van Gogh's style", "Van Gogh", "an oil painting"),
    ("a Picasso style cat", "Picasso", "a cat"),
    ("Pikachu eating pizza in Paris", "pizza", "Pikachu eating something in Paris"),
    # Lists.
    ("Pikachu and Eevee in a field", "Pikachu", "Eevee in a field"),
    ("Eevee and Pikachu in a field", "Pikachu", "Eevee in a field"),
    ("a cat with Pikachu and Eevee", "Pikachu", "a cat with Eevee"),
    ("a robot in the style of Van Gogh and Monet", "Van Gogh", "a robot in the style of Monet"),
    ("a cat, a dog and a bird", "dog", "a cat and a bird"),
    ("a cat, a dog, and a bird", "bird", "a cat, a dog"),
    ("a cat, a dog, and a bird", "cat", "a dog, and a bird"),
    # Every place, in any number, and no part of a word.
    ("two cats and a cat's bowl beside a catapult", "a cat", "a bowl beside a catapult"),
    ("cherries and a bowl", "cherry", "a bowl"),
    ("a bowl of apples", "apple", "a bowl"),
    # A word put in would be the concept's own.
    ("picture of a dog in the style of X", "picture", "an image of a dog in the style of X"),
    ("a cute thing", "thing", "a cute"),
    # Other scripts and symbols; the rules are English, the words are found all the same.
    ("猫の絵", "猫", "の絵"),
    ("🐱 in the style of Picasso", "🐱", "a picture in the style of Picasso"),
    ("portrait of ZOË by x", "zoë", "portrait by x"),
    ("chat dans le style de Monet", "Monet", "chat dans le style de"),
]


@pytest.mark.parametrize(("prompt", "concept", "expected"), COUNTER_PROMPTS)
def test_counter_prompts(prompt: str, concept: str, expected: str) -> None:
    assert counter_prompt(prompt, concept) == expected


WORDS = [
    "a",
    "an",
    "the",
    "cat",
    "Cat",
    "cats",
    "Pikachu",
    "Picasso",
    "in",
    "style",
    "of",
    "by",
    "with",
    "and",
    ",",
    ".",
    "(",
    ")",
    "-",
    "&",
    "picture",
    "thing",
    "something",
    "red",
    "riding",
    "猫",
    "🐱",
    "cat's",
    "!",
    "'",
    "wearing",
    "two",
    "painted",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=8).map("".join),
    st.text(max_size=30),
)


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_any_text_gives_a_tidy_counter_prompt_or_a_concept_error(prompt: str, concept: str) -> None:
    try:
        found = Concept.from_prompt(prompt, concept)
    except ConceptError:
        return
    absent = found.absent
    assert isinstance(absent, str)
    assert not occurrences(absent, concept)
    assert not re.search(r"\s\s|^\s|\s$|,\s*,|\(\s*\)| ,", absent)
    keys = [word.key for word in words(absent)]
    assert keys[0] not in CONJUNCTIONS
    assert keys[-1] not in ARTICLES | CONJUNCTIONS | PREPOSITIONS
    assert counter_prompt(absent, concept) == absent


def test_occurrences_are_whole_words_side_by_side() -> None:
    prompt = "New York, new  york; new, york, newyork and New Yorks"
    assert [prompt[start:stop] for start, stop in occurrences(prompt, "new york")] == [
        "New York",
        "new  york",
        "New Yorks",
    ]
    assert occurrences("a Pikachu-like dog", "Pikachu") == []  # a hyphen makes one word
    assert [word.key for word in words("👩‍🎨👍🏽 café ไทย")] == [
        "👩‍🎨",
        "👍🏽",
        "café",
        "ไ",
        "ท",
        "ย",
    ]
    assert occurrences("cafe\u0301 by x", "café") == [(0, 5)]  # however the accent is written


def test_a_concept_from_a_prompt_shows_both_sides_and_can_be_overridden() -> None:
    concept = Concept.from_prompt("Pikachu in the style of  Picasso", "pikachu")
    assert concept == Concept(
        "pikachu",
        "Pikachu in the style of Picasso",
        "a picture in the style of Picasso",
        alone="pikachu",
    )
    assert str(concept) == (
        'pikachu: "Pikachu in the style of Picasso" without it: "a picture in the style of Picasso"'
    )
    assert concept.isolated() == Concept("pikachu", "pikachu", "")
    mask = torch.ones(4, 4)
    other = Concept.from_prompt(
        "a cat by x", "cat", absent="an animal by x", alone="one cat", name="it", mask=mask
    )
    assert (other.name, other.absent, other.alone) == ("it", "an animal by x", "one cat")
    assert other.mask is mask
    whole = Concept.from_prompt("Pikachu", "Pikachu", absent="a picture")
    assert whole.absent == "a picture"


@pytest.mark.parametrize(
    ("prompt", "concept", "message"),
    [
        ("a cat by x", "dog", r"not in the prompt. Its words: .*cat.*HINT"),
        ("a Pikachu-like dog", "Pikachu", r"Its words: Pikachu-like,"),
        ("a catapult", "cat", "not in the prompt"),
        ("Pikachu", "Pikachu", r"nothing is left.*HINT.*absent="),
        ("the cat.", "cat", "nothing is left"),
        ("", "cat", "expected a prompt"),
        ("a cat", " ,. ", "expected a prompt, and words"),
    ],
)
def test_prompts_that_make_no_question(prompt: str, concept: str, message: str) -> None:
    with pytest.raises(ConceptError, match=message):
        Concept.from_prompt(prompt, concept)


def test_a_prompt_split_into_its_parts() -> None:
    prompt = "Pikachu and a cat in the style of Van Gogh"
    mask = torch.ones(4, 4)
    parts = Concept.split(prompt, ["Van Gogh", "Pikachu", "cat"], mask=mask)
    assert [(part.name, part.absent) for part in parts] == [
        ("Van Gogh", "Pikachu and a cat"),
        ("Pikachu", "a cat in the style of Van Gogh"),
        ("cat", "Pikachu in the style of Van Gogh"),
    ]
    assert all(part.present == prompt and part.mask is mask for part in parts)
    for overlapping in (["Gogh", "Van Gogh"], ["cat", "cats"], ["style of Van Gogh", "Van"]):
        longer, shorter = sorted(overlapping, key=len, reverse=True)
        with pytest.raises(ConceptError, match=f"'{longer}' and '{shorter}' overlap.*HINT"):
            Concept.split(prompt, overlapping)
    with pytest.raises(ConceptError, match="expected a list"):
        Concept.split(prompt, [])
    with pytest.raises(ConceptError, match="expected a list"):
        Concept.split(prompt, "cat")  # a string is a list of letters
    with pytest.raises(ConceptError, match="'dog'.*not in the prompt"):
        Concept.split(prompt, ["cat", "dog"])


def test_images_and_masks_that_make_no_question() -> None:
    image, mask = torch.zeros(3, 4, 6), torch.zeros(4, 6)
    mask[0, 0] = 1
    given_ = Concept("x", {"a": "1"}, {}, image=image, mask=mask)
    assert given_ == Concept("x", {"a": "1"}, {}, image=image.clone(), mask=mask.clone())
    assert given_ != Concept("x", {"a": "1"}, {}, image=image + 0.1, mask=mask)
    assert given_ != Concept("x", {"a": "1"}, {}, image=image)
    facts = given_.to_dict()
    assert facts["image"]["shape"] == [3, 4, 6]
    assert len(facts["mask"]["sha256"]) == 64
    assert facts != Concept("x", {"a": "1"}, {}, image=image + 0.1, mask=mask).to_dict()
    assert repr(given_) == (
        "Concept('x', present={'a': '1'}, absent={}, image=torch.float32 [3, 4, 6], "
        "mask=torch.float32 [4, 6])"
    )
    wrong_images = (image[0], image + 2, image * float("nan"), image.byte(), "a.png", image[:2])
    for wrong in wrong_images:
        with pytest.raises(ConceptError, match=r"expected 'generated', None .*HINT"):
            Concept("x", {"a": "1"}, {}, image=wrong)  # type: ignore[arg-type]
    for wrong, message in (
        (mask * 0, "zero everywhere"),
        (mask[0], r"expected a tensor \[H, W\]"),
        (mask * 2, "between 0 and 1"),
        (mask * float("nan"), "between 0 and 1"),
        (mask.T, r"the image has \[4, 6\] pixels"),
    ):
        with pytest.raises(ConceptError, match=message):
            Concept("x", {"a": "1"}, {}, image=image, mask=wrong)
    with pytest.raises(ConceptError, match="a global query is about no one image"):
        Concept("x", {"a": "1"}, {}, image=None, mask=mask)
    with pytest.raises(ConceptError, match="HINT: Concept.*alone="):
        Concept("x", "an x", "a y", image=None)
    assert Concept("x", {"a": "1"}, {}, image=None).to_dict() == {
        "name": "x",
        "present": {"a": "1"},
        "absent": {},
        "image": None,
        "alone": {"a": "1"},
    }
