"""An Ed25519 signature of a ledger's head: what no one without the key can make for another
ledger."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ctrak_lightning.errors import StoreError
from ctrak_lightning.provenance.history import replay
from ctrak_lightning.provenance.ledger import Entry, Ledger, canonical
from ctrak_lightning.store.files import is_there, reading, write_atomically
from ctrak_lightning.store.lock import hold_for
from ctrak_lightning.store.schema import LEDGER, LEDGER_SIGNATURE, is_integer
from ctrak_lightning.utilities.naming import utc_now

_LONGEST = 2**14
_HEX = re.compile("([0-9a-f]{2})+")
_KEYS = {"algorithm", "entries", "head", "public_key", "run_id", "time", "signature"}


def sign(path: str | Path, key: str | Path) -> dict[str, Any]:
    """Signs the ledger of a store as it is now, in place of an earlier signature.

    The signature covers how many entries there are, the hash of the last one, and with that all of
    them. Questions may be added later, uncovered; after anything else the store has to be signed
    again. Run :func:`~ctrak_lightning.provenance.verify` first: a signature vouches for what it
    finds.

    Args:
        path: folder of the store.
        key: PEM file of an Ed25519 private key, without a password (``openssl genpkey -algorithm
            ed25519``).

    Returns:
        What was written to ``ledger.signature.json``.

    Raises:
        StoreLockedError: a run writes to the store, or a `ctrak forget`.
        StoreError: there is no ledger or it is empty, the key cannot be used, or the ``sign`` extra
            is not installed.
        CorruptStoreError: the chain is damaged.
    """
    root = Path(path)
    private = _key(Path(key), "private")
    ledger = Ledger(root)
    ledger.require()
    with hold_for(root, "signs its ledger") as lock:
        entries = ledger.entries()
        if not entries:
            raise StoreError(
                f"{root / LEDGER} has no entry. HINT: sign once a run has been recorded."
            )
        signed = {
            "algorithm": "Ed25519",
            "entries": len(entries),
            "head": entries[-1].sha256,
            "public_key": private.public_key().public_bytes_raw().hex(),
            "run_id": replay(entries).run_id,
            "time": utc_now(),
        }
        document = signed | {"signature": private.sign(canonical(signed)).hex()}
        lock.require()
        content = canonical(document) + b"\n"
        write_atomically(root / LEDGER_SIGNATURE, lambda file: file.write_bytes(content))
    return document


def signature_problems(
    root: Path, entries: Sequence[Entry], public_key: str | Path | None = None
) -> list[str]:
    """What is wrong with the signature of a ledger, one line each; nothing where it is not signed
    and no key is asked for.

    Args:
        root: folder of the store.
        entries: of its ledger.
        public_key: PEM file of the key that must have signed, everything but the questions asked
            since. Without it a signature only shows that whoever signed had the key that stands
            beside it.

    Raises:
        StoreError: ``public_key`` cannot be used, or the ``sign`` extra is not installed.
    """
    expected = None
    if public_key is not None:
        expected = _key(Path(public_key), "public").public_bytes_raw().hex()
    document = read_signature(root)
    if document is None:
        missing = f"{LEDGER_SIGNATURE}: is missing, the ledger is not signed"
        return [] if expected is None else [missing]
    if "problem" in document:
        return [f"{LEDGER_SIGNATURE}: {document['problem']}"]
    problems = []
    if expected is not None and document["public_key"] != expected:
        problems.append(
            f"{LEDGER_SIGNATURE}: is signed with another key ({document['public_key']})"
        )
    if not _is_valid(document):
        problems.append(f"{LEDGER_SIGNATURE}: the signature is not of these facts")
    count = document["entries"]
    if len(entries) < count:
        problems.append(
            f"{LEDGER}: has {len(entries)} sound entries, {count} were signed: entries were "
            "removed or damaged"
        )
    elif entries[count - 1].sha256 != document["head"]:
        problems.append(f"{LEDGER}: entry {count - 1} is not the one that was signed")
    elif expected is not None:
        problems += _unsigned(entries[count:])
    return problems


def _unsigned(later: Sequence[Entry]) -> list[str]:
    """Questions change nothing of what is asked; whatever else came after the signature, anybody
    can have written."""
    return [
        f"{LEDGER}: entry {entry.sequence} ({entry.kind}) came after the signature, which does not "
        "vouch for it. HINT: hold the store against what you know to have happened since, then "
        "sign again"
        for entry in later
        if entry.kind != "query"
    ]


def read_signature(root: Path) -> dict[str, Any] | None:
    """What stands in the signature file, not checked but for its form; ``{"problem": ...}`` where
    that is wrong, None without."""
    path = root / LEDGER_SIGNATURE
    if not is_there(path):
        return None
    try:
        with reading(path) as file:
            content = file.read(_LONGEST)
        document = json.loads(content.decode("ascii"))
        same = canonical(document) + b"\n" == content
    except (OSError, ValueError, RecursionError) as error:
        return {"problem": f"cannot be read ({error})"}
    if not same or not isinstance(document, dict) or document.keys() != _KEYS:
        return {"problem": "is not written as the library writes it"}
    texts = [document[name] for name in ("head", "public_key", "signature")]
    # Lower case only: the same bytes in other letters are not what was written.
    are_hex = all(isinstance(text, str) and _HEX.fullmatch(text) for text in texts)
    if not are_hex or not is_integer(document["entries"]) or document["entries"] < 1:
        return {"problem": "does not have the facts of a signature"}
    return document


def _is_valid(document: dict[str, Any]) -> bool:
    from_raw = _ed25519().Ed25519PublicKey.from_public_bytes
    from cryptography.exceptions import InvalidSignature

    signed = {name: value for name, value in document.items() if name != "signature"}
    try:
        key = from_raw(bytes.fromhex(document["public_key"]))
        key.verify(bytes.fromhex(document["signature"]), canonical(signed))
    except (InvalidSignature, ValueError):
        return False
    return bool(document["algorithm"] == "Ed25519")


def _key(path: Path, kind: Literal["private", "public"]) -> Any:
    ed25519 = _ed25519()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        content = path.read_bytes()
        key: Any = (
            serialization.load_pem_private_key(content, password=None)
            if kind == "private"
            else serialization.load_pem_public_key(content)
        )
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(path, kind, error) from error
    if not isinstance(key, getattr(ed25519, f"Ed25519{kind.capitalize()}Key")):
        raise _unusable(path, kind, f"it is a {type(key).__name__}")
    return key


def _unusable(path: Path, kind: str, why: object) -> StoreError:
    make = "openssl genpkey -algorithm ed25519 -out key.pem"
    if kind == "public":
        make = "openssl pkey -in key.pem -pubout -out public.pem"
    return StoreError(
        f"{path} is no Ed25519 {kind} key that can be used ({why}). Expected a PEM file without a "
        f"password. HINT: {make}"
    )


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise StoreError(
            "Signatures need the package `cryptography`, which is not installed. HINT: pip "
            "install 'ctrak-lightning[sign]'"
        ) from error
    return ed25519
