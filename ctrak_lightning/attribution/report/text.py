"""Text of other people's data, made safe to read. (That it cannot be markup is jinja2's work, and
the script's, which writes text nodes only.)"""

import re
from collections.abc import Mapping

from ctrak_lightning.task import Spec

MOST = 1000
"""Characters of a value that a page shows."""
_LINK = re.compile(r"https?://[^\s\"'<>\\^`{|}]+", re.IGNORECASE)
# Direction marks, embeddings, overrides and isolates: with them "gpj.exe" can be shown as
# "exe.jpg".
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SHOWN = {ord(character): f"[U+{ord(character):04X}]" for character in _DIRECTIONS}
_SHOWN |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN |= {0x7F: "\u2421"} | {code: f"[U+{code:04X}]" for code in range(0x80, 0xA0)}


def shown(text: str, most: int = MOST) -> str:
    """``text`` as a page shows it: what is invisible or turns the reading direction is spelt out,
    and what is too long is cut, with a word that says so.

    Example:
        >>> shown("a" * 12, most=10)
        'aaaaaaaaaa… (2 more characters)'
        >>> shown("cat\\u202egpj.exe")
        'cat[U+202E]gpj.exe'
    """
    more = len(text) - most
    cut = f"{text[:most]}… ({more:,} more characters)" if more > 0 else text
    # Lone surrogates, as the command line makes of bytes that are not UTF-8, could not be written.
    return cut.translate(_SHOWN).encode("utf-8", "backslashreplace").decode("utf-8")


def link(text: str) -> str | None:
    """``text`` if it is a web address and nothing else, else None: no other scheme becomes a link.

    Example:
        >>> link("javascript:alert(1)") is None
        True
    """
    return text if len(text) <= MOST and _LINK.fullmatch(text) else None


def spec_text(spec: Spec) -> str:
    """A concept's condition in words: the prompt, or ``attribute: value`` pairs; empty for the null
    condition."""
    if isinstance(spec, Mapping):
        return shown(", ".join(f"{key}: {value}" for key, value in spec.items()))
    return shown(spec)
