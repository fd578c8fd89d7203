"""The words of the captions: what an object and an artist are called, in what sentences."""

from collections.abc import Sequence

STYLES = {
    "noto": "softly shaded style",
    "noto-v1": "round cartoon style",
    "twemoji": "plain flat style",
    "openmoji": "outlined style",
    "fluent-emoji-flat": "modern flat style",
    "fluent-emoji-high-contrast": "bold black and white style",
    "emojione": "glossy vector style",
    "emojione-monotone": "monochrome icon style",
}
"""What each artist's drawings look like, in words; read off a grid of the drawings."""

BOTH = (
    "{an_object} by {artist}",
    "{an_object}, {style} by {artist}",
    "{an_object} in the style of {artist}",
    "an emoji of {an_object}, drawn by {artist}",
)
# "an hourglass not done by noto" reads as something by noto, by the rules for counter-prompts too.
RENAMED = {"hourglass-not-done": "flowing hourglass"}
OBJECT_ONLY = ("{an_object}", "an emoji of {an_object}")
ARTIST_ONLY = (
    "by {artist}",
    "{style} by {artist}",
    "in the style of {artist}",
    "an emoji drawn by {artist}",
    "a picture by {artist}",
)
NEITHER = ("", "an emoji", "a picture")
DROP_OBJECT, DROP_ARTIST, DROP_ALL = 0.1, 0.1, 0.1


def words(name: str) -> str:
    """A name as a caption writes it: ``christmas-tree`` is "christmas tree"."""
    return RENAMED.get(name, name.replace("-", " "))


def caption(template: str, object: str = "", artist: str = "") -> str:
    """A template filled in. Names are those of the data file."""
    name = words(object)
    article = "an" if name[:1] in "aeiou" else "a"
    return template.format(
        an_object=f"{article} {name}", artist=words(artist), style=STYLES.get(artist, "")
    )


def wordings(object: str | None, artist: str | None) -> list[str]:
    """Every caption of an image of which the object, the artist, both or neither are told."""
    if object and artist:
        return [caption(template, object, artist) for template in BOTH]
    if object:
        return [caption(template, object) for template in OBJECT_ONLY]
    if artist:
        return [caption(template, artist=artist) for template in ARTIST_ONLY]
    return list(NEITHER)


def all_wordings(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Every caption that training on these (object, artist) pairs can show, once."""
    told: list[tuple[str | None, str | None]] = [*pairs, (None, None)]
    told += [(name, None) for name, _ in pairs] + [(None, artist) for _, artist in pairs]
    return list(dict.fromkeys(text for one in told for text in wordings(*one)))
