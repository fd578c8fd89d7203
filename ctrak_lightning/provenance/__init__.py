"""Where a store's traces come from: its ledger, and what can be done with it."""

from ctrak_lightning.provenance.ledger import Entry, Ledger
from ctrak_lightning.provenance.query_log import LedgerWarning
from ctrak_lightning.provenance.recording import sync
from ctrak_lightning.provenance.signature import sign
from ctrak_lightning.provenance.verify import verify

__all__ = ["Entry", "Ledger", "LedgerWarning", "sign", "sync", "verify"]
