"""The samples of a store as a Croissant data set
(https://docs.mlcommons.org/croissant/docs/croissant-spec.html)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctrak_lightning.provenance.recorded_store import RecordedStore
from ctrak_lightning.traces.manifest import read_manifest

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
    licences = sorted({v for name in LICENCE_COLUMNS for v in table.metadata.get(name, []) if v})
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": f"samples-of-run-{''.join(c for c in recorded.store.run_id if c.isalnum() or c in '-_')[:64]}",
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
