"""Two-sided random projections of per-layer gradient matrices, and the count-sketch that joins
them."""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """How gradients become features; the same numbers on every device, and for every layer
    regardless of the others.

    A layer's gradient matrix G [rows, cols] becomes ``P_out.T @ G @ P_in`` with Gaussian sides of
    variance 1/p (the identity where a side has at most ``rank`` entries); the layers' blocks are
    then count-sketched to ``dim`` numbers. Both steps keep inner products without bias: E<phi(G),
    phi(H)> = <G, H>.

    Args:
        rank: columns p of each side of a layer's projection.
        dim: length of a feature row; None concatenates the blocks without a sketch.
        seed: seed of all matrices and hashes.

    Raises:
        ValueError: a field is not an integer of its range.

    Example:
        >>> Projection(rank=8, dim=None).to_dict()
        {'rank': 8, 'dim': None, 'seed': 0}
    """

    rank: int = 16
    dim: int | None = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        _require_integer("rank", self.rank, minimum=1)
        _require_integer("seed", self.seed, minimum=0)
        if self.dim is not None:
            _require_integer("dim", self.dim, minimum=1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON facts; ``Projection(**facts)`` makes the projection again."""
        return asdict(self)


class BlockProjector:
    """The projection matrices of named blocks, and the map from blocks to feature rows.

    Args:
        projection: the settings.
        shapes: for each block's name its gradient matrix's (rows, cols).
    """

    def __init__(self, projection: Projection, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.projection = projection
        self.names = sorted(shapes)
        self._shapes = dict(shapes)
        rank = projection.rank
        self._sizes = {
            name: min(rows, rank) * min(cols, rank) for name, (rows, cols) in shapes.items()
        }
        self._matrices: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self._hashes: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
        self._owners: dict[torch.device, tuple[list[Tensor], list[Tensor], Tensor]] = {}

    @property
    def dim(self) -> int:
        """Length k of a feature row."""
        return self.projection.dim or self.width

    def matrices(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """P_out [rows, min(rows, rank)] and P_in [cols, min(cols, rank)] of a block, float32."""
        key = (name, device)
        if key not in self._matrices:
            rows, cols = self._shapes[name]
            self._matrices[key] = (
                self._side(name, "out", rows).to(device),
                self._side(name, "in", cols).to(device),
            )
        return self._matrices[key]

    def project(self, name: str, matrices: Tensor) -> Tensor:
        """Features [B, p_out * p_in] of a block's explicit gradients [B, rows, cols]."""
        left, right = self.matrices(name, matrices.device)
        return (left.mT @ matrices.float() @ right).flatten(1)

    @property
    def width(self) -> int:
        """Length P of the joined blocks, before the sketch."""
        return sum(self._sizes.values())

    def join(self, blocks: Mapping[str, Tensor], batch_size: int, device: torch.device) -> Tensor:
        """Blocks [B, p_out * p_in] side by side [B, P], in the order of their names; a missing
        block is zero."""
        joined = torch.zeros(batch_size, self.width, dtype=torch.float32, device=device)
        for name, part in self._parts(joined):
            if name in blocks:
                part.copy_(blocks[name])
        return joined

    def reached(self, joined: Tensor) -> set[str]:
        """The names of the blocks that are not all zero in joined blocks [B, P]."""
        return {name for name, part in self._parts(joined) if part.any()}

    def unit_blocks(self, joined: Tensor) -> Tensor:
        """Joined blocks [B, P] with each block of a row scaled to norm 1; an all-zero block stays
        zero."""
        # Blocks of one size at once: a network has hundreds, and a device waits for none of them.
        norms = joined.new_empty(len(joined), len(self.names))  # [B, L]
        places, blocks, owners = self._places(joined.device)
        for place, block in zip(places, blocks, strict=True):
            norms[:, block] = joined[:, place].unflatten(1, (len(block), -1)).norm(dim=2)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        return joined / norms[:, owners]

    def only(self, joined: Tensor, names: Collection[str]) -> Tensor:
        """Joined blocks [B, P] with zeros in all but the named ones."""
        kept = torch.zeros_like(joined)
        for (name, target), (_, source) in zip(self._parts(kept), self._parts(joined), strict=True):
            if name in names:
                target.copy_(source)
        return kept

    def sketch(self, joined: Tensor, salt: int = 0) -> Tensor:
        """Joined blocks [B, P] as feature rows [B, k]; another salt gives another, independent
        sketch."""
        if self.projection.dim is None:
            return joined
        buckets, signs = self._hash(joined.device, salt)
        return joined.new_zeros(len(joined), self.projection.dim).index_add_(
            1, buckets, joined * signs
        )

    def _places(self, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """For each size of blocks where their coordinates are [n * size] and which they are [n]; and
        the block of each coordinate [P]."""
        if device not in self._owners:
            sizes = torch.tensor([self._sizes[name] for name in self.names])
            owners = torch.arange(len(sizes)).repeat_interleave(sizes)
            of_size = sizes[owners]
            places = [(of_size == size).nonzero().flatten() for size in sizes.unique()]
            blocks = [(sizes == size).nonzero().flatten() for size in sizes.unique()]
            self._owners[device] = (
                [place.to(device) for place in places],
                [block.to(device) for block in blocks],
                owners.to(device),
            )
        return self._owners[device]

    def _parts(self, joined: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The blocks of joined rows, as views."""
        sizes = [self._sizes[name] for name in self.names]
        return zip(self.names, joined.split(sizes, dim=1), strict=True)

    def _side(self, name: str, side: str, size: int) -> Tensor:
        rank = self.projection.rank
        if size <= rank:
            return torch.eye(size, dtype=torch.float32)
        generator = _generator(self.projection.seed, side, name)
        return torch.randn(size, rank, generator=generator, dtype=torch.float32) / math.sqrt(rank)

    def _hash(self, device: torch.device, salt: int) -> tuple[Tensor, Tensor]:
        """Bucket and sign of each coordinate of the joined blocks; each block draws its own."""
        if (device, salt) not in self._hashes:
            buckets, signs = [], []
            for name in self.names:
                generator = _generator(
                    self.projection.seed, "sketch", name, *([salt] if salt else [])
                )
                size = (self._sizes[name],)
                buckets.append(torch.randint(self.dim, size, generator=generator))
                signs.append(torch.randint(2, size, generator=generator).float() * 2 - 1)
            self._hashes[device, salt] = (
                torch.cat(buckets).to(device),
                torch.cat(signs).to(device),
            )
        return self._hashes[device, salt]


def _generator(*key: int | str) -> torch.Generator:
    # A CPU generator: CUDA's draws other numbers from the same seed.
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _require_integer(field: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"`Projection({field}={value!r})`: expected an integer of at least "
            f"{minimum}{' or None (no sketch)' if field == 'dim' else ''}. HINT: the default is "
            f"{getattr(Projection, field)!r}."
        )
