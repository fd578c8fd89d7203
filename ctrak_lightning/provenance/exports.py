"""A store's record in two standard formats: Croissant and PROV."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ctrak_lightning.provenance.ledger import Entry
from ctrak_lightning.provenance.recording import RecordedStore
from ctrak_lightning.store.manifest import read_manifest

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The terms of Croissant 1.0, as its specification gives them."""
LICENCE_COLUMNS = ("licence", "license")


def croissant(path: str | Path) -> dict[str, Any]:
    """The sample table as a record set with its rows inline, and the file that holds it, as
    JSON-LD.

    Fields are ``sample_id``, ``content_sha256`` and ``column_0``, ``column_1``, ... for the
    metadata columns by name, whose names are the fields' descriptions: a column may be called
    anything, a field may not. Samples that were forgotten do not appear.

    Raises:
        StoreError, CorruptStoreError: as :meth:`RecordedStore.open`.
    """
    recorded = RecordedStore.open(path)
    table, dataset = recorded.store.samples, recorded.history.dataset or {}
    manifest = read_manifest(recorded.store.path)
    file = manifest.files[manifest.samples]  # its own digest, which the ledger keeps salted
    columns = {"sample_id": table.sample_ids, "content_sha256": table.content_sha256}
    described = {
        "sample_id": "The id of the sample in its data set.",
        "content_sha256": "sha256 of its content.",
    }
    for number, name in enumerate(sorted(table.metadata)):
        columns[f"column_{number}"], described[f"column_{number}"] = table.metadata[name], name
    rows = [
        {f"samples/{name}": values[i] for name, values in columns.items()}
        for i in range(len(table))
    ]
    plain_id = "".join(c for c in recorded.store.run_id if c.isalnum() or c in "-_")
    licences = sorted({v for name in LICENCE_COLUMNS for v in table.metadata.get(name, []) if v})
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": f"samples-of-run-{plain_id[:64]}",
        "description": f"The {len(table)} samples that run {recorded.store.run_id} was traced on.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "version": f"1.{dataset['edition']}.0",
        "datePublished": recorded.history.runs[0].time,
        **({"license": licences} if licences else {}),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": manifest.samples,
                "name": manifest.samples,
                "contentUrl": manifest.samples,
                "contentSize": f"{file.bytes} B",
                "encodingFormat": "application/x-hdf5",
                "sha256": file.sha256,
            }
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "key": {"@id": "samples/sample_id"},
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"samples/{name}",
                        "name": name,
                        "description": described[name],
                        "dataType": "sc:Text",
                    }
                    for name in columns
                ],
                "data": rows,
            }
        ],
    }


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
        facts = {"prov:startTime": run.time, "ctrak:run_id": run.facts["run_id"]}
        if number in ends:
            facts |= {"prov:endTime": ends[number].time, "ctrak:outcome": ends[number].kind}
        records["activity"][activity] = facts
        _relate(records, "used", activity=activity, entity="ctrak:base-model")
        _relate(records, "used", activity=activity, entity="ctrak:dataset")
        _relate(records, "wasAssociatedWith", activity=activity, agent="ctrak:software")
    if (parent := begun["parent"]) is not None:
        records["entity"]["ctrak:parent-run"] = {
            "ctrak:run_id": parent["run_id"],
            "ctrak:ledger_head": parent["head"],
            "ctrak:weights": parent["weights"],
        }
        ends_at = {"generatedEntity": "ctrak:base-model", "usedEntity": "ctrak:parent-run"}
        _relate(records, "wasDerivedFrom", **ends_at)
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
