"""Questions that two processes of a Fabric ask of one store: ``python -m
tests.attribution.fabric_worker STORE OUT``."""

import json
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from ctrak_lightning import Attributor
from ctrak_lightning.utilities.processes import DistributedProcesses

from ..toy import ToyDiffusion
from .test_attributor import BAR, RED, SAMPLER


def main(store: str, out: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    attributor = Attributor(store, ToyDiffusion().double(), sampler=SAMPLER)
    query = attributor.query([RED, BAR], [4, 5])
    found = attributor.top(query, 5, damping="agreement", fabric=fabric)
    processes = DistributedProcesses()
    told = {
        "records": [[[record.sample_id, record.score] for record in records] for records in found],
        "gathered": processes.gather(f"from {fabric.global_rank}"),
        "sum": processes.sum(torch.tensor([1.0, fabric.global_rank])).tolist(),
        "first": processes.from_first(fabric.global_rank),
        "errors": [],
    }
    for failing in (0, 1):
        try:
            with processes.sharing_errors():
                if fabric.global_rank == failing:
                    raise OSError("no disk")
        except Exception as error:
            told["errors"].append([type(error).__name__, str(error)])
    Path(f"{out}-{fabric.global_rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
