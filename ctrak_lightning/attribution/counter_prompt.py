"""A prompt without a concept's words: the counter-prompt of a question. Pure functions on text.

Words are found in any script; what is left is made good by rules for English (articles,
prepositions, "in the style of"). They are rules, not a parser, so look at what they give
(``print(concept)``), and give a counter-prompt of your own where it is odd.
"""

import difflib
import re
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


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What comes before a noun and goes with it.
DETERMINERS = ARTICLES | _listed(
    """this that these those my your his her its our their some several many few both one two three four
    five six seven eight nine ten"""
)
CONJUNCTIONS = frozenset({"and", "or", "&"})
PREPOSITIONS = _listed(
    """about above across after against along among around as at before behind below beneath beside between
    by during featuring for from in inside into like near of off on onto over through to toward towards
    under underneath upon via with within without"""
)
# What leads to a name and means nothing without it.
LEADS = (
    "in the style of",
    "in the manner of",
    "inspired by",
    "in style of",
    "style of",
    "art by",
    "artwork by",
)
# Nouns in -ing, which else would be taken for what the lost subject does ("a cat wearing a hat").
ING_NOUNS = _listed(
    """building ceiling clothing drawing earring engraving etching evening king lettering lighting
    lightning morning offering painting printing pudding railing rendering ring setting spring string
    swing thing wedding wing anything everything nothing something"""
)
PARTICIPLES = frozenset(
    {"drawn", "made", "done", "shown", "taken", "shot", "seen", "built", "written"}
)
STAND_INS = ("a picture", "an image")
"""For a subject that is lost: "in the style of Picasso" becomes "a picture in the style of
Picasso"; the second, where the first is the concept itself."""
THING, SOMETHING = "thing", "something"
_FEW = 2

_STOPS = ",;:.!?|"
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\u201c": "\u201d", "\u00ab": "\u00bb"}


def counter_prompt(prompt: str, concept: str) -> str:
    """The prompt without the concept's words, at none of their places; ``""`` if nothing is left.

    What led to the words goes with them ("in the style of", "by", "of", "with", "and", an article).
    A subject that is lost leaves ``"a picture"``, so that the rest still says something of
    something; a noun that had a word of its own leaves ``"thing"``.

    Example:
        >>> counter_prompt("Pikachu in the style of Picasso", "Pikachu")
        'a picture in the style of Picasso'
        >>> counter_prompt("Pikachu in the style of Picasso", "Picasso")
        'Pikachu'
        >>> counter_prompt("a photo of a red apple and a cat on a beach", "cat")
        'a photo of a red apple on a beach'
        >>> counter_prompt("a photo of a red apple and a cat on a beach", "red")
        'a photo of an apple and a cat on a beach'
    """
    text = tidied(prompt)
    while places := occurrences(text, concept):
        start, stop = places[0]
        shorter = _without(text, start, stop, concept)
        # A word put in instead may be the concept's own ("picture", "thing"); then nothing is put
        # in.
        if len(occurrences(shorter, concept)) >= len(places):
            shorter = tidied(text[:start] + " " + text[stop:])
        text = shorter
    return text if words(text) else ""


def tidied(text: str) -> str:
    """A text without doubled spaces, empty brackets, stray commas, and articles, conjunctions or
    prepositions that lead nowhere at its end, or conjunctions at its beginning."""
    before = None
    while text != before:
        before = text
        text = " ".join(text.split())
        for opening, closing in _BRACKETS.items():
            text = re.sub(
                rf"{re.escape(opening)}[\s{re.escape(_STOPS)}]*{re.escape(closing)}", " ", text
            )
        text = re.sub(r"\s+([,;:.!?)\]}])", r"\1", text)
        text = re.sub(r"([(\[{])\s+", r"\1", text)
        text = re.sub(r"([,;:|])(?:\s*[,;:|])+", r"\1", text)
        text = re.sub(r"[,;:|]+([.!?)\]}])", r"\1", text)
        text = re.sub(r"([.!?])\s*\.(?=\s|$)", r"\1", text)
        text = re.sub(r"([(\[{])[,;:|]+\s*", r"\1", text)
        text = text.lstrip(_STOPS + " ").rstrip(",;:| ")
        text = _without_dangling(text)
    return text


def _without(text: str, start: int, stop: int, concept: str) -> str:
    """The text without one occurrence."""
    left, right = text[:start].rstrip(), text[stop:].lstrip()
    # "in Picasso's style", "a Picasso style cat": the style was the concept's.
    right = re.sub(r"^(style|styled|manner)\b\s*", "", right, flags=re.IGNORECASE)
    before, after = _last_words(left), _first_words(right)
    is_clause_start = not left or left[-1] in _STOPS or left[-1] in _BRACKETS
    follower = after[0] if after else ""
    if follower and not _is_glue(follower) and not _is_doing(follower):
        # It told more of what follows: "a red apple".
        return tidied(f"{_with_article_for(left, follower)} {right}")
    determined = bool(before) and before[-1] in DETERMINERS
    qualifiers = _qualifiers(before)
    if qualifiers and not is_clause_start:
        # A noun that was told more of, "a cute cat on a beach", or what a verb was about, "a girl
        # riding Pikachu".
        noun = (
            THING if len(before) > qualifiers and before[-qualifiers - 1] in ARTICLES else SOMETHING
        )
        if before[-1].endswith("ing") and before[-1] not in ING_NOUNS:
            noun = SOMETHING
        elif noun == SOMETHING and qualifiers > _FEW:
            noun = ""  # No such English: another language, or a list of words.
        return tidied(f"{left} {noun} {right}")
    if _is_doing(follower):
        # "a cat wearing a hat": somebody still wears it.
        return tidied(f"{_without_determiners(left)} {SOMETHING} {right}")
    bare = _without_determiners(left)
    if not bare:
        return tidied(_opening(right, follower, determined, concept))
    if follower in CONJUNCTIONS:
        # "a cat with Pikachu and Eevee": the other one takes the place.
        rest = right[len(follower) :].lstrip()
        if rest and bare[-1] in ",;":
            return tidied(f"{bare.rstrip(',; ')} {right}")
        return tidied(f"{bare} {rest}")
    return tidied(f"{_without_leads(bare)} {right}")


def _opening(right: str, follower: str, was_determined: bool, concept: str) -> str:
    """What a prompt becomes that began with the concept."""
    stand_in = next((each for each in STAND_INS if not occurrences(each, concept)), "")
    if follower in CONJUNCTIONS and right[:1] not in _STOPS:
        return right[len(follower) :]
    if follower in PREPOSITIONS and right[:1] not in _STOPS:
        return f"{stand_in} {right}"
    listed = follower in DETERMINERS or follower in CONJUNCTIONS
    if right[:1] == "," and was_determined and not listed and follower:
        return f"{stand_in}{right}"
    return right


def _with_article_for(left: str, follower: str) -> str:
    """Puts "a" or "an", if that is how it ends, as the next word wants it."""
    match = re.search(r"(?<!\S)(an?)$", left, re.IGNORECASE)
    if match is None:
        return left
    fitting = "an" if follower[0] in "aeiou" else "a"
    if match[1].lower() == fitting:
        return left
    return left[: match.start()] + (fitting.capitalize() if match[1][0].isupper() else fitting)


def _without_determiners(text: str) -> str:
    while (last := _last_words(text)) and last[-1] in DETERMINERS:
        text = text[: words(text)[-1].start].rstrip()
    return text


def _without_leads(text: str) -> str:
    """Without the words at its end that led to what is gone: "in the style of", "painted by", "and
    a", "with the"."""
    while last := _last_words(text):
        lead = next(
            (lead for lead in LEADS if tuple(last[-len(lead.split()) :]) == tuple(lead.split())),
            None,
        )
        if lead is None and last[-1] not in DETERMINERS | CONJUNCTIONS | PREPOSITIONS:
            break
        count = 1 if lead is None else len(lead.split())
        if (
            last[-1] == "by"
            and lead is None
            and len(last) > 1
            and (last[-2].endswith("ed") or last[-2] in PARTICIPLES)
        ):
            count = 2
        text = text[: words(text)[-count].start].rstrip(" ,;:")
    return text


def _without_dangling(text: str) -> str:
    """Without glue at the end of the text or of a bracket, before a comma, or a conjunction at the
    beginning."""
    have = words(text)
    for i, word in enumerate(have):
        rest = text[word.stop :].lstrip()
        is_last = i + 1 == len(have)
        ends = is_last or rest[0] in _STOPS + ")]}"
        if ends and (word.key in ARTICLES | CONJUNCTIONS or (word.key in PREPOSITIONS and is_last)):
            return text[: word.start].rstrip() + text[word.stop :]
        if i == 0 and word.key in CONJUNCTIONS:
            return text[: word.start] + rest
    return text


def _qualifiers(before: Sequence[str]) -> int:
    """How many words directly before tell more of a noun: content words back to an article, or to
    the clause's beginning."""
    count = 0
    while count < len(before) and not _is_glue(before[-count - 1]):
        count += 1
    return count


def _last_words(text: str) -> list[str]:
    """The keys of the words of the clause that a text ends with."""
    keys: list[str] = []
    stop = len(text)
    for word in reversed(words(text)):
        if any(character in _STOPS + "()[]{}" for character in text[word.stop : stop]):
            break
        keys.append(word.key)
        stop = word.start
    return keys[::-1]


def _first_words(text: str) -> list[str]:
    """The keys of the words that a text begins with; none where it begins with a stop other than a
    comma's list."""
    have = words(text)
    if not have:
        return []
    gap = text[: have[0].start].strip()
    if gap == ",":
        # Only to see whether a list goes on.
        return [have[0].key if _is_glue(have[0].key) else ","]
    return [] if gap else [word.key for word in have[:3]]


def _is_glue(key: str) -> bool:
    return (
        key == ","
        or key in DETERMINERS
        or key in CONJUNCTIONS
        or key in PREPOSITIONS
        or key in _VERBS
    )


_VERBS = frozenset({"is", "are", "was", "were", "has", "have", "which", "who", "whose"})


def _is_doing(key: str) -> bool:
    """Whether a word after a noun says what the noun does or is."""
    return (key.endswith("ing") and len(key) > 4 and key not in ING_NOUNS) or key in _VERBS
