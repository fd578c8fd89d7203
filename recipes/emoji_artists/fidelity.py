"""What a projection costs: how well the scores of projected and of rounded traces agree with those of the gradients themselves.

python -m recipes.emoji_artists.fidelity      # after `benchmark`, whose seed-1 fine-tune it traces; writes results/fidelity.*
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning import Attributor, Projection, methods
from ctrak_lightning.metrics import spearman
from ctrak_lightning.store.shards import stored_unit
from recipes.benchmarks.replay import replay
from recipes.emoji_artists import benchmark
from recipes.emoji_artists.data import EmojiArtists
from recipes.emoji_artists.evaluate import questions
from recipes.emoji_artists.outcomes import RESULTS

DIMS = (512, 2048, 4096, 16384)
RANKS = (4, 16)
DAMPINGS = (None, 10.0, 1.0, 0.1)
STEP = 300
SEED = 1
QUESTIONS = 32
# A side of at most this many entries is not projected at all; no layer here has more.
EXACT = Projection(rank=100_000, dim=None)


def scores(queries: Tensor, traces: Tensor, damping: float | None) -> Tensor:
    """Scores [Q, N] of queries [Q, k] against traces [N, k], by the dual form (N < k here)."""
    gram = traces.double() @ traces.double().T
    plain = queries.double() @ traces.double().T
    if damping is None:
        return plain
    ridge = damping * float(gram.diagonal().mean())
    solved: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), plain.T)
    return solved.T


def rounded(rows: Tensor, dtype: str) -> Tensor:
    """Rows [N, k] as they come back from a store of a smaller type."""
    norm = rows.norm(dim=1, keepdim=True)
    unit, scale = stored_unit(rows / norm, dtype)
    back: Tensor = unit.float() * scale[:, None] * norm
    return back


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    data = EmojiArtists("new")
    asked = questions(data.held_out)[:QUESTIONS]
    case = benchmark.case(args.runs / "labelled" / f"full-seed{SEED}", data, asked)
    assert case.given is not None
    method = methods.concept_trak_norm(benchmark.TIMESTEPS)
    projections = {"exact": EXACT}
    projections |= {f"rank {rank}, no sketch": Projection(rank=rank, dim=None) for rank in RANKS}
    projections |= {f"rank 16, {dim}": Projection(rank=16, dim=dim) for dim in DIMS}
    both: dict[str, tuple[Tensor, Tensor]] = {}
    for name, projection in projections.items():
        folder = args.runs / "labelled" / "fidelity" / name.replace(", ", "-").replace(" ", "-")
        store = replay(
            case.folder, case.module, case.batches, method, folder, steps=(STEP,), projection=projection
        )
        attributor = Attributor(store, case.module, sampler=case.sampler, given="noised", batch_size=32)
        query = attributor.query_given(case.concepts, case.given[:QUESTIONS])
        both[name] = (query.features[0], store.checkpoints[0].features())
    queries, traces = both["rank 16, 4096"]
    for dtype in ("float16", "int8"):
        both[f"rank 16, 4096, {dtype}"] = (queries, rounded(traces, dtype))
    rows: dict[str, dict[str, float]] = {}
    for damping in DAMPINGS:
        truth = scores(*both["exact"], damping)
        for name, pair in both.items():
            row = rows.setdefault(name, {"dimensions": pair[1].shape[1]})
            row[str(damping)] = round(float(spearman(scores(*pair, damping), truth).mean()), 4)
    facts = {
        "command": "python -m recipes.emoji_artists.fidelity",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "samples": len(data.train_set),
        "questions": len(asked),
        "rows": rows,
    }
    (args.results / "fidelity.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    lines = [
        f"`{facts['command']}`; {facts['machine']}; {facts['samples']} samples, {facts['questions']} given images, one "
        "checkpoint.",
        "",
        "Spearman's correlation of the scores with those of the whole gradients, mean over questions, by damping:",
        "",
        f"| projection | dimensions | {' | '.join(map(str, DAMPINGS))} |",
        "|---" * (2 + len(DAMPINGS)) + "|",
    ]
    for name, row in rows.items():
        cells = " | ".join(f"{row[str(damping)]:.3f}" for damping in DAMPINGS)
        lines.append(f"| {name} | {row['dimensions']:,.0f} | {cells} |")
    text = "\n".join(lines) + "\n"
    (args.results / "fidelity.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
