"""Networks that are spread over processes are refused with the reason."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ctrak_lightning import GradientTracer
from ctrak_lightning.errors import GradientError


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_fully_shard() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    GradientTracer(network)
    fully_shard(network[1], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(GradientError, match=r"1\.weight is a DTensor.*whole of a layer.*HINT"):
        GradientTracer(network)


def test_wrappers_and_deepspeed() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    with pytest.raises(GradientError, match=r"block is FullyShardedDataParallel.*HINT"):
        GradientTracer(nn.ModuleDict({"block": FullyShardedDataParallel()}))
    network = nn.Linear(2, 2)
    network.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(GradientError, match=r"weight is a parameter of DeepSpeed.*HINT"):
        GradientTracer(network)
