"""Where a store's traces come from: its ledger, and what can be done with it."""

from ctrak_lightning.provenance.exports import croissant, prov_json
from ctrak_lightning.provenance.forgetting import Forgotten, forget
from ctrak_lightning.provenance.ledger import Entry, Ledger
from ctrak_lightning.provenance.parents import Link, lineage
from ctrak_lightning.provenance.recording import LedgerWarning, sync
from ctrak_lightning.provenance.signature import sign
from ctrak_lightning.provenance.summary import ledger_summary, model_card
from ctrak_lightning.provenance.verification import verify

__all__ = [
    "Entry",
    "Forgotten",
    "Ledger",
    "LedgerWarning",
    "Link",
    "croissant",
    "forget",
    "ledger_summary",
    "lineage",
    "model_card",
    "prov_json",
    "sign",
    "sync",
    "verify",
]
