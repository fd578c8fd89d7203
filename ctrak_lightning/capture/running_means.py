"""The means of training steps' rows, from one checkpoint to the next."""

import torch
from torch import Tensor

from ctrak_lightning.errors import StoreError, listed
from ctrak_lightning.store import Visits
from ctrak_lightning.store.sections import sorted_visits


class RunningTraces:
    """The mean row of every sample over the training steps of a window, which lasts from one
    checkpoint to the next.

    A sample that no step of the window saw (a shuffled loader with ``drop_last``, say) keeps the
    mean of the last window that did. Memory: N x k float32.
    """

    def __init__(self, sample_ids: list[str], dim: int) -> None:
        n = len(sample_ids)
        self._sample_ids = sample_ids
        self._sums = torch.zeros(n, dim)
        self._losses = torch.zeros(n)
        self._counts = torch.zeros(n, dtype=torch.int64)
        self._windows = torch.zeros(n, dtype=torch.int64)
        self._window = 1
        self._seen: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def add(
        self, positions: Tensor, rows: Tensor, *, loss: float, timesteps: Tensor, step: int
    ) -> None:
        """The rows [b, k] that one training step gave the samples at ``positions`` [b] of the
        table.

        Args:
            positions: int64; a sample may be there more than once.
            rows: float32, on the CPU.
            loss: of the batch.
            timesteps: the denoiser's argument [b].
            step: optimizer steps taken before.
        """
        # A sample's old mean goes only when it is seen again: some windows miss some samples.
        fresh = positions[self._windows[positions] != self._window]
        for total in (self._sums, self._losses, self._counts):
            total[fresh] = 0
        self._windows[fresh] = self._window
        self._sums.index_add_(0, positions, rows)
        self._losses.index_add_(0, positions, torch.full((len(positions),), loss))
        self._counts.index_add_(0, positions, torch.ones_like(positions))
        steps = torch.full_like(positions, step)
        self._seen.append((positions, timesteps.float(), steps, self._window))

    def require_all(self, exposures: Tensor | None = None) -> None:
        """Raises a StoreError that names samples which no training step has seen yet, but for those
        whose ``exposures`` [N] are known to be 0: nothing was trained on them."""
        missing = self._counts == 0
        unseen = missing if exposures is None else missing & (exposures > 0)  # [N]
        names = [self._sample_ids[i] for i in unseen.nonzero().flatten().tolist()]
        if names:
            raise StoreError(
                f"{len(names)} of {len(self._sample_ids)} samples have been in no training step "
                f"yet: {listed(names)}. Expected each of them once at least before a checkpoint. "
                "HINT: trace with every_n_epochs; let trace_dataloader() give the samples that "
                "are trained on, with the ids that training batches have."
            )

    def means(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The mean rows [b, k] of samples, and the mean loss [b] of the batches that they were in;
        zeros for samples that were in none."""
        counts = self._counts[positions].clamp(min=1).float()
        return self._sums[positions] / counts.unsqueeze(1), self._losses[positions] / counts

    def zeros(self) -> Tensor:
        """Whose mean rows are all zero, bool [N]."""
        return ~self._sums.any(1)

    def visits(self) -> Visits:
        """The steps that the present means are over."""
        samples, timesteps, steps = self._current()
        return sorted_visits(samples, timesteps, steps, len(self._sample_ids))

    def begin_window(self) -> None:
        """After a checkpoint: a sample that is seen again starts a new mean."""
        samples, timesteps, steps = self._current()
        self._seen = [
            (samples[rows], timesteps[rows], steps[rows], window)
            for window in self._windows[samples].unique().tolist()
            for rows in [self._windows[samples] == window]
        ]
        self._window += 1

    def continue_from(self, rows: Tensor, losses: Tensor, visits: Visits) -> None:
        """Takes the means [N, k] of a sealed checkpoint for those of the last window, where a run
        is resumed."""
        self._counts = visits.counts.clone()
        self._sums = rows * self._counts.unsqueeze(1)
        self._losses = losses * self._counts
        self._windows = torch.full_like(self._counts, self._window)
        samples = torch.repeat_interleave(torch.arange(len(self._counts)), self._counts)
        self._seen = [(samples, visits.timesteps, visits.steps, self._window)]
        self.begin_window()

    def _current(self) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, timesteps and steps of the visits that the means are over, in the order of
        time."""
        parts = [
            (samples[kept], timesteps[kept], steps[kept])
            for samples, timesteps, steps, window in self._seen
            for kept in [self._windows[samples] == window]
        ]
        empty = torch.empty(0, dtype=torch.int64)
        if not parts:
            return empty, torch.empty(0), empty
        samples, timesteps, steps = (torch.cat(several) for several in zip(*parts, strict=True))
        return samples, timesteps, steps
