"""The questions that a store is asked, in its ledger."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance.commitments import edition_salt, salted
from ctrak_lightning.provenance.environment import json_value
from ctrak_lightning.provenance.ledger import Ledger


class LedgerWarning(UserWarning):
    """Something could not be recorded in a store's ledger."""


class QueryLog:
    """Notes questions and the digests of their answers; nothing, where the store has no ledger.

    Args:
        root: folder of the store.
        edition: of its files, as they are read.
        asker: who asks, or None.
    """

    def __init__(self, root: Path, edition: int, asker: str | None) -> None:
        self._ledger = Ledger(root)
        self._edition = edition
        self._asker = asker
        self._has_warned = False

    def note(
        self,
        concepts: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        answers: Iterable[tuple[Sequence[str], Sequence[float]]],
        *,
        dampings: Sequence[float | None],
        methods: Sequence[dict[str, Any]],
        steps: Sequence[int],
        samples: Literal["all", "top"],
    ) -> None:
        """One entry for each question.

        Args:
            concepts: what was asked.
            seeds: of the generated images.
            answers: sample ids and scores of each; not looked at without a ledger.
            dampings: as used for each.
            methods: by which each was asked.
            steps: of the checkpoints.
            samples: whether an answer has all of them, in the order of the sample table, or the
                best, in that of the ranking.

        Warns:
            LedgerWarning: they cannot be recorded (once; the folder is read-only, say).
        """
        if not self._ledger.exists:
            return
        shared = {"steps": list(steps), "samples": samples, "asker": self._asker}
        asked = list(zip(concepts, seeds, methods, dampings, answers, strict=True))
        try:
            salt = edition_salt(self._ledger.root, self._edition)
            each = [
                shared
                | {
                    "method": method,
                    "concept": _salted_images(json_value(concept), salt),
                    "seed": seed,
                    "damping": damping,
                    "count": len(answer[0]),
                    "result_sha256": salted(result_digest(*answer), salt),
                }
                for concept, seed, method, damping, answer in asked
            ]
            self._ledger.append_all([("query", facts) for facts in each])
        except StoreError as error:
            self._warn(error)

    def _warn(self, error: StoreError) -> None:
        if not self._has_warned:
            warnings.warn(
                f"Questions are not recorded: {error} The answers are not affected. HINT: "
                "Attributor(..., record=False) asks without recording.",
                LedgerWarning,
                stacklevel=5,
            )
        self._has_warned = True


def _salted_images(concept: dict[str, Any], salt: bytes) -> dict[str, Any]:
    """A question may be about a sample's own picture, which the ledger must not remember once the
    sample is forgotten."""
    given = {
        name: concept[name] for name in ("image", "mask") if isinstance(concept.get(name), dict)
    }
    return concept | {
        name: value | {"sha256": salted(value["sha256"], salt)} for name, value in given.items()
    }


def result_digest(sample_ids: Sequence[str], scores: Sequence[float]) -> str:
    """sha256 (hex) of an answer: the ids, each ended by NUL, then the scores as little-endian
    float32."""
    found = hashlib.sha256("".join(f"{sample_id}\0" for sample_id in sample_ids).encode())
    found.update(np.asarray(scores, dtype="<f4").tobytes())
    return found.hexdigest()
