"""Which states should an existing image get, where the method looks at those of a generation: inverted or noised?

python -m recipes.emoji_artists.inversion --demo demo      # after `ctrak demo`; writes results/inversion.*

Two answers. How far the inverted states of images of our own generation are from the generation's; and the R-precision of
questions about the real drawings of the held-out pairs, which the model did not generate.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning import Attributor, Sampler
from ctrak_lightning.attribution.query import Query
from ctrak_lightning.metrics import spearman
from recipes.emoji_artists.data import EmojiArtists
from recipes.emoji_artists.demo import ARTISTS, SAMPLER, SHEETS
from recipes.emoji_artists.evaluate import Question, questions, r_precision
from recipes.emoji_artists.module import EmojiDiffusion
from recipes.emoji_artists.network import patchify
from recipes.emoji_artists.outcomes import RESULTS

GUIDANCES = (1.0, SAMPLER.guidance)
TRIPS = ((1.0, 1.0), (2.5, 1.0), (2.5, 2.5), (7.5, 1.0), (7.5, 7.5))


def round_trip(attributor: Attributor, asked: Sequence[Question], under: float) -> dict[str, float]:
    """Relative distances of inverted states from the generation's own."""
    specs = [question.concept().present for question in asked]
    generation = attributor.generate(specs, list(range(len(specs))))
    inverted = attributor.invert(specs, generation.latents, guidance=under)
    usable = generation.states[len(generation.states) - len(inverted.states) :]
    errors = [
        float(((mine.x_t - theirs.x_t).flatten(1).norm(dim=1) / theirs.x_t.flatten(1).norm(dim=1)).median())
        for mine, theirs in zip(inverted.states, usable, strict=True)
    ]
    return {
        "generated under": attributor.sampler.guidance,
        "inverted under": under,
        "most noise": round(errors[0], 4),
        "median of states": round(float(torch.tensor(errors).median()), 4),
        "least noise": round(errors[-1], 4),
        "length of the noisiest": round(lengths(inverted.states[0].x_t), 4),
        "of the generation's": round(lengths(usable[0].x_t), 4),
    }


def scored(attributor: Attributor, query: Query) -> list[Tensor]:
    """The scores [N] of every question."""
    return [result.scores for result in attributor.score(query)]


def lengths(states: Tensor) -> float:
    """The median root mean square of states [B, ...]; of pure noise it is 1."""
    return float(states.flatten(1).square().mean(1).sqrt().median())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    store = args.demo / "traces" / SHEETS
    module, data = EmojiDiffusion("lora"), EmojiArtists("new", list(ARTISTS))
    asked = questions(data.held_out[: args.pairs])
    concepts = [question.concept() for question in asked]
    real = patchify(data.held_out_set.images[: args.pairs]).repeat_interleave(2, 0)

    trips, rows = [], {}
    scores: dict[str, list[Tensor]] = {}

    def attributor(sampler: Sampler, given: str = "inverted") -> Attributor:
        return Attributor(store, module, sampler=sampler, given=given, record=False)  # type: ignore[arg-type]

    specs = [concept.present for concept in concepts]
    own = attributor(SAMPLER)
    for made, under in TRIPS:
        trips.append(round_trip(attributor(replace(SAMPLER, guidance=made)), asked[:32:2], under))
        print(trips[-1], flush=True)
    for guidance in GUIDANCES:
        inverted = own.invert(specs, real, guidance=guidance)
        scores[f"inverted, guidance {guidance:g}"] = scored(own, own.query(concepts, generation=inverted))
    noising = attributor(SAMPLER, "noised")
    scores["noised"] = scored(noising, noising.query_given(concepts, real))
    seeds = [i // 2 for i in range(len(asked))]
    scores["generated images instead"] = scored(own, own.query(concepts, seeds))
    for name, found in scores.items():
        rows[name] = {
            kind: round(value, 3) for kind, value in r_precision(asked, found, own.store.samples).items()
        }
        like = spearman(torch.stack(found), torch.stack(scores["generated images instead"])).mean()
        rows[name]["like the generated image's"] = round(float(like), 3)
    facts = {
        "command": f"python -m recipes.emoji_artists.inversion --pairs {args.pairs}",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "round trip": trips,
        "rows": rows,
    }
    (args.results / "inversion.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    columns = list(next(iter(rows.values())))
    lines = [
        f"`{facts['command']}`, on the traces of `ctrak demo`; {facts['machine']}; {len(asked)} questions about the real drawings of "
        f"{args.pairs} held-out pairs.",
        "",
        f"| states of the drawing | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
        *(
            f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |"
            for name, row in rows.items()
        ),
        "",
        "Relative distance of inverted states from those of the generation, 16 generated images, medians:",
        "",
        f"| {' | '.join(trips[0])} |",
        "|---" * len(trips[0]) + "|",
        *(f"| {' | '.join(f'{value:g}' for value in trip.values())} |" for trip in trips),
    ]
    (args.results / "inversion.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
