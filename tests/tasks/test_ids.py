"""Ids become plain text, whatever kind of text or whole number a data set has."""

from typing import Any

import numpy as np
import pytest
import torch

from ctrak_lightning import Encoded
from ctrak_lightning.errors import BatchError
from ctrak_lightning.tasks import named_samples
from ctrak_lightning.tasks.base import plain_ids


@pytest.mark.parametrize(
    "given",
    [
        ["1000", "7"],
        [1000, 7],
        torch.tensor([1000, 7]),
        list(torch.tensor([1000, 7], dtype=torch.int32)),
        np.array([1000, 7]),
        np.array(["1000", "7"]),
        [np.int64(1000), torch.tensor(7)],
    ],
)
def test_whole_numbers_and_text_become_the_same_text(given: Any) -> None:
    class Task:
        def sample_ids(self, batch: Any) -> Any:
            return batch

    assert plain_ids(given) == ["1000", "7"]
    assert named_samples(Task(), given) == ["1000", "7"]
    encoded = Encoded(latents=torch.zeros(2, 1), condition={}, sample_ids=given)
    assert encoded.sample_ids == ["1000", "7"]
    assert all(type(name) is str for name in encoded.sample_ids)


@pytest.mark.parametrize(
    "given",
    [
        [1.0],
        [None],
        [""],
        [True],
        [b"a"],
        torch.tensor([0.5]),
        torch.tensor([[1]]),
        "ab",
        [str(torch.tensor(3))],
        ["tensor(3, device='cuda:0')"],
    ],
)
def test_what_names_no_sample_is_refused(given: Any) -> None:
    with pytest.raises(BatchError, match="Sample ids: .*HINT: give every sample an id"):
        plain_ids(given)
