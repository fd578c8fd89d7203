"""What a projection costs: how well the scores of projected and of rounded traces agree with those
of the gradients themselves.

python -m recipes.benchmarks.fidelity      # after `emoji`, whose seed-1 fine-tune it traces
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning import Attributor, Projection, methods
from ctrak_lightning.metrics import spearman
from ctrak_lightning.store.formats import stored_unit

from ..emoji_artists.data import EmojiArtists
from ..emoji_artists.evaluate import questions
from . import emoji
from .replay import replay
from .tables import command_of, grid, machine, parser_of, publish

# A side of at most this many entries is not projected at all; no layer here has more.
PROJECTIONS = {
    "exact": Projection(rank=100_000, dim=None),
    **{f"rank {rank}, no sketch": Projection(rank=rank, dim=None) for rank in (4, 16)},
    **{f"rank 16, {dim}": Projection(rank=16, dim=dim) for dim in (512, 2048, 4096, 16384)},
}
DAMPINGS = (None, 10.0, 1.0, 0.1)
STEP = 300
SEED = 1
QUESTIONS = 32


def scores(queries: Tensor, traces: Tensor, damping: float | None) -> Tensor:
    """Scores [Q, N] of queries [Q, k] against traces [N, k], by the dual form (N < k here)."""
    gram = traces.double() @ traces.double().T
    plain = queries.double() @ traces.double().T
    if damping is None:
        return plain
    ridge = damping * float(gram.diagonal().mean())
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    solved: Tensor = torch.linalg.solve(damped, plain.T)
    return solved.T


def rounded(rows: Tensor, dtype: str) -> Tensor:
    """Rows [N, k] as they come back from a store of a smaller type."""
    norm = rows.norm(dim=1, keepdim=True)
    unit, scale = stored_unit(rows / norm, dtype)
    back: Tensor = unit.float() * scale[:, None] * norm
    return back


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.fidelity", __doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args(argv)
    data, runs = EmojiArtists("new"), args.runs / "labelled"
    asked = questions(data.held_out)[:QUESTIONS]
    case = emoji.case(runs / f"full-seed{SEED}", data, asked)
    assert case.given is not None
    method = methods.concept_trak_norm(emoji.TIMESTEPS)
    both: dict[str, tuple[Tensor, Tensor]] = {}
    for name, projection in PROJECTIONS.items():
        store = replay(
            case.folder,
            case.module,
            case.batches,
            method,
            runs / "fidelity" / name.replace(", ", "-").replace(" ", "-"),
            steps=(STEP,),
            projection=projection,
        )
        options: dict[str, Any] = {"sampler": case.sampler, "given": "noised", "batch_size": 32}
        attributor = Attributor(store, case.module, **options)
        query = attributor.query_given(case.concepts, case.given[:QUESTIONS])
        both[name] = (query.features[0], store.checkpoints[0].features())
    queries, traces = both["rank 16, 4096"]
    for dtype in ("float16", "int8"):
        both[f"rank 16, 4096, {dtype}"] = (queries, rounded(traces, dtype))
    truth = {damping: scores(*both["exact"], damping) for damping in DAMPINGS}
    rows = [
        [
            name,
            f"{pair[1].shape[1]:,}",
            *(f"{float(spearman(scores(*pair, d), truth[d]).mean()):.3f}" for d in DAMPINGS),
        ]
        for name, pair in both.items()
    ]
    lines = [
        f"`{command_of(parser, args)}`; {machine()}; {len(data.train_set)} samples, {len(asked)} "
        "given images, one checkpoint.",
        "",
        "Spearman's correlation of the scores with those of the whole gradients, mean over "
        "questions, by damping:",
        "",
        *grid(["projection", "dimensions", *map(str, DAMPINGS)], rows),
    ]
    publish(args.results / "fidelity.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
