"""One text for one value: what is hashed and signed."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces and ASCII only; equal values give equal bytes.

    Raises:
        ValueError, TypeError: the value is not JSON (a number that is not finite, an object of
            Python's).
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def digest(value: Any) -> str:
    """sha256 (hex) of :func:`canonical`."""
    return hashlib.sha256(canonical(value)).hexdigest()
