"""Randomness that leaves the surrounding program's own untouched."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seeds python, numpy and torch inside the block and restores all three afterwards, also after
    an exception.

    (Lightning's ``isolate_rng`` does not restore after an exception.)
    """
    states = (random.getstate(), np.random.get_state())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seeded_noise(shape: Sequence[int], seed: int, timestep: float, key: str) -> Tensor:
    """Standard normal noise (float32, CPU) that depends on these arguments alone."""
    digest = hashlib.sha256(f"{seed}/{timestep}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
