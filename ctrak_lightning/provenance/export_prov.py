"""A store's ledger as W3C PROV, in its JSON form
(https://www.w3.org/submissions/2013/SUBM-prov-json-20130424/)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ctrak_lightning.provenance.ledger import Entry
from ctrak_lightning.provenance.recorded_store import RecordedStore

NAMESPACE = "urn:ctrak-lightning:prov:"
COLUMN_NAMESPACE = "urn:ctrak-lightning:prov:column:"
_LOCAL_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,63}")

Records = dict[str, dict[str, dict[str, Any]]]


def prov_json(path: str | Path) -> dict[str, Any]:
    """The runs (activities), the samples, weights, traces and answers (entities), and the owners
    and the software (agents).

    Samples that were forgotten do not appear; each forgetting does, as an activity.

    Raises:
        StoreError, CorruptStoreError: as :meth:`RecordedStore.open`.
    """
    recorded = RecordedStore.open(path)
    records: Records = defaultdict(dict)
    _add_samples(records, recorded)
    _add_runs(records, recorded)
    _add_checkpoints(records, recorded)
    for number, entry in enumerate(recorded.history.queries):
        _add_query(records, number, entry)
    return {"prefix": {"ctrak": NAMESPACE, "column": COLUMN_NAMESPACE}, **records}


def _add_samples(records: Records, recorded: RecordedStore) -> None:
    table, dataset = recorded.store.samples, recorded.history.dataset or {}
    records["entity"]["ctrak:dataset"] = {
        "prov:type": {"$": "prov:Collection", "type": "xsd:QName"},
        "ctrak:size": len(table),
        "ctrak:digest": dataset["commitments"]["root"],
        "ctrak:forgotten": len(recorded.history.tombstones),
    }
    owners: dict[str, str] = {}
    for i in range(len(table)):
        sample, metadata = f"ctrak:sample-{i}", table.metadata_of(i)
        plain = {
            f"column:{name}": value
            for name, value in metadata.items()
            if _LOCAL_NAME.fullmatch(name)
        }
        other = {name: value for name, value in metadata.items() if not _LOCAL_NAME.fullmatch(name)}
        records["entity"][sample] = {
            "ctrak:sample_id": table.sample_ids[i],
            "ctrak:content_sha256": table.content_sha256[i],
            **plain,
            **({"ctrak:other_columns": json.dumps(other, sort_keys=True)} if other else {}),
        }
        _relate(records, "hadMember", collection="ctrak:dataset", entity=sample)
        if owner := metadata.get("owner"):
            agent = owners.setdefault(owner, f"ctrak:owner-{len(owners)}")
            records["agent"][agent] = {"prov:label": owner}
            _relate(records, "wasAttributedTo", entity=sample, agent=agent)


def _add_runs(records: Records, recorded: RecordedStore) -> None:
    history = recorded.history
    begun = history.runs[0].facts
    base = begun["base_model"]
    records["entity"]["ctrak:base-model"] = {
        "prov:label": str(base["name"] or "base model"),
        "ctrak:revision": str(base["revision"] or ""),
        "ctrak:frozen_weights": base["frozen"],
        "ctrak:trained_weights": base["trained"],
    }
    code = history.runs[-1].facts["code"]
    records["agent"]["ctrak:software"] = {
        "prov:type": {"$": "prov:SoftwareAgent", "type": "xsd:QName"},
        **{
            f"ctrak:version_{name.replace('-', '_')}": version
            for name, version in code["packages"].items()
        },
        **({} if code["git"] is None else {"ctrak:commit": code["git"]["commit"]}),
    }
    ends = {_run_before(history.runs, end): end for end in history.ends}
    for number, run in enumerate(history.runs):
        activity = f"ctrak:run-{number}"
        records["activity"][activity] = {
            "prov:startTime": run.time,
            "ctrak:run_id": run.facts["run_id"],
        } | (
            {"prov:endTime": ends[number].time, "ctrak:outcome": ends[number].kind}
            if number in ends
            else {}
        )
        _relate(records, "used", activity=activity, entity="ctrak:base-model")
        _relate(records, "used", activity=activity, entity="ctrak:dataset")
        _relate(records, "wasAssociatedWith", activity=activity, agent="ctrak:software")
    if (parent := begun["parent"]) is not None:
        records["entity"]["ctrak:parent-run"] = {
            "ctrak:run_id": parent["run_id"],
            "ctrak:ledger_head": parent["head"],
            "ctrak:weights": parent["weights"],
        }
        _relate(
            records,
            "wasDerivedFrom",
            generatedEntity="ctrak:base-model",
            usedEntity="ctrak:parent-run",
        )
    records["entity"]["ctrak:ledger"] = {"ctrak:head": recorded.head}
    for number, entry in enumerate(history.forgets):
        records["activity"][f"ctrak:forget-{number}"] = {
            "prov:startTime": entry.time,
            "prov:endTime": entry.time,
            "ctrak:samples": len(entry.facts["tombstones"]),
        }


def _add_checkpoints(records: Records, recorded: RecordedStore) -> None:
    last = f"ctrak:run-{len(recorded.history.runs) - 1}"
    for step, facts in sorted(recorded.history.checkpoints.items()):
        weights, traces = f"ctrak:weights-{step}", f"ctrak:traces-{step}"
        made = _run_of(recorded.history.runs, recorded.history.made.get(step), last)
        records["entity"][weights] = {"ctrak:step": step, "ctrak:weights": str(facts["weights"])}
        records["entity"][traces] = {
            "ctrak:step": step,
            **{
                f"ctrak:file_{i}": f"{name} {known['sha256']}"
                for i, (name, known) in enumerate(sorted(facts["files"].items()))
            },
        }
        for entity in (weights, traces):
            _relate(records, "wasGeneratedBy", entity=entity, activity=made)
        _relate(records, "wasDerivedFrom", generatedEntity=weights, usedEntity="ctrak:base-model")
        _relate(records, "wasDerivedFrom", generatedEntity=traces, usedEntity=weights)
        _relate(records, "wasDerivedFrom", generatedEntity=traces, usedEntity="ctrak:dataset")


def _add_query(records: Records, number: int, entry: Entry) -> None:
    facts = entry.facts
    activity, answer = f"ctrak:query-{number}", f"ctrak:answer-{number}"
    records["activity"][activity] = {
        "prov:startTime": entry.time,
        "prov:endTime": entry.time,
        "ctrak:concept": json.dumps(facts.get("concept"), sort_keys=True),
        "ctrak:asker": str(facts.get("asker") or ""),
    }
    records["entity"][answer] = {"ctrak:result_sha256": str(facts.get("result_sha256"))}
    _relate(records, "wasGeneratedBy", entity=answer, activity=activity)
    for step in facts.get("steps", []):
        if f"ctrak:traces-{step}" in records["entity"]:
            _relate(records, "used", activity=activity, entity=f"ctrak:traces-{step}")


def _relate(records: Records, kind: str, **ends: str) -> None:
    records[kind][f"_:{kind}{len(records[kind])}"] = {
        f"prov:{name}": value for name, value in ends.items()
    }


def _run_before(runs: list[Entry], entry: Entry) -> int:
    return max((i for i, run in enumerate(runs) if run.sequence < entry.sequence), default=0)


def _run_of(runs: list[Entry], entry: Entry | None, otherwise: str) -> str:
    return otherwise if entry is None else f"ctrak:run-{_run_before(runs, entry)}"
