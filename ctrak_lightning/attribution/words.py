"""Words of a text in any script, and where a concept's words stand among them."""

import difflib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

ARTICLES = frozenset({"a", "an", "the"})

_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a text, from ``start`` to ``stop``, and the ``key`` under which it is compared."""

    start: int
    stop: int
    key: str


def words(text: str) -> list[Word]:
    """The words of a text. Hyphens and apostrophes join; in scripts without spaces every character
    is a word, and so is every symbol, an emoji for one.

    Example:
        >>> [word.key for word in words("A Christmas-tree, by Picasso \U0001f43a")]
        ['a', 'christmas-tree', 'by', 'picasso', '\U0001f43a']
    """
    found: list[Word] = []
    i = 0
    while i < len(text):
        kind = _kind(text[i])
        start, i = i, i + 1
        if kind == "":
            continue
        while i < len(text):
            joins = (
                text[i] in "-'\u2019"
                and kind == "letter"
                and i + 1 < len(text)
                and _kind(text[i + 1]) == "letter"
            )
            same = kind == "letter" and _kind(text[i]) == "letter"
            glued = kind == "symbol" and text[i - 1] == "\u200d" and _kind(text[i]) == "symbol"
            if not (joins or same or glued or _is_mark(text[i])):
                break
            i += 1
        found.append(Word(start, i, _key(text[start:i])))
    return found


def occurrences(prompt: str, concept: str) -> list[tuple[int, int]]:
    """Where the concept's words stand in a prompt, ``(start, stop)`` each: as whole words in their
    order, whatever the case, the last of them in the singular or plural or with a possessive. An
    article before the concept's words does not count.

    Example:
        >>> occurrences("Cats, a cat's bowl and a catapult", "a cat")
        [(0, 4), (8, 13)]
    """
    asked = _bare(concept)
    have = words(prompt)
    found: list[tuple[int, int]] = []
    i = 0
    while asked and i + len(asked) <= len(have):
        part = have[i : i + len(asked)]
        if _matches(part, asked) and _are_together(prompt, concept, part, asked):
            found.append((part[0].start, part[-1].stop))
            i += len(asked)
        else:
            i += 1
    return found


def near_words(prompt: str, concept: str, most: int = 5) -> list[str]:
    """The words of a prompt that are most like the concept's, likest first."""
    own = {word.key: prompt[word.start : word.stop] for word in words(prompt)}
    keys = [word.key for word in words(concept)]
    ranked = sorted(own, key=lambda key: -max((_likeness(key, each) for each in keys), default=0.0))
    return [own[key] for key in ranked[:most]]


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _bare(concept: str) -> list[Word]:
    """The concept's words, without articles before them if there are others."""
    found = words(concept)
    while len(found) > 1 and found[0].key in ARTICLES:
        found = found[1:]
    return found


def _matches(part: Sequence[Word], asked: Sequence[Word]) -> bool:
    if any(a.key != b.key for a, b in zip(part[:-1], asked[:-1], strict=True)):
        return False
    return _are_alike(part[-1].key, asked[-1].key)


def _are_alike(a: str, b: str) -> bool:
    """Equal but for number and possessive."""
    if a == b:
        return True
    a, b = _without_possessive(a), _without_possessive(b)
    return a == b or b in _plurals(a) or a in _plurals(b)


def _without_possessive(key: str) -> str:
    return key.removesuffix("'s").removesuffix("'") or key


def _plurals(key: str) -> set[str]:
    if len(key) < 3 or not key.isalpha():
        return set()
    found = {key + "s", key + "es"}
    if key.endswith("y") and key[-2] not in "aeiou":
        found.add(key[:-1] + "ies")
    return found


def _are_together(prompt: str, concept: str, part: Sequence[Word], asked: Sequence[Word]) -> bool:
    """Whether nothing but spaces, or what stands there in the concept too, is between the words."""
    for i in range(1, len(part)):
        mine, theirs = (
            prompt[part[i - 1].stop : part[i].start],
            concept[asked[i - 1].stop : asked[i].start],
        )
        if mine.strip() and mine.split() != theirs.split():
            return False
    return True


def _key(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return unicodedata.normalize("NFKC", folded)


def _kind(character: str) -> str:
    """``"letter"`` (or digit), ``"one"`` (a word in itself), ``"symbol"`` or, of what is no word,
    ``""``."""
    if character.isalnum() or character == "_":
        spaceless = unicodedata.name(character, "").startswith(_SPACELESS)
        return "one" if spaceless else "letter"
    category = unicodedata.category(character)
    if _is_mark(character):
        return ""
    return "symbol" if category in ("So", "Sc", "Sm", "Sk") or character == "&" else ""


def _is_mark(character: str) -> bool:
    """Whether a character belongs to the one before it: combining marks, joiners, the tones of
    emoji."""
    return (
        unicodedata.category(character) in ("Mn", "Mc", "Me")
        or character in "\u200d\ufe0f"
        or ("\U0001f3fb" <= character <= "\U0001f3ff")
    )
