"""Which states should an existing image get, where the method looks at those of a generation:
inverted or noised?

python -m recipes.benchmarks.inversion --demo demo      # after `ctrak demo`

Two answers. How far the inverted states of images of our own generation are from the generation's;
and the R-precision of questions about the real drawings of the held-out pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning import Attributor, Sampler
from ctrak_lightning.attribution.queries import Query
from ctrak_lightning.metrics import spearman

from ..emoji_artists.data import KINDS, EmojiArtists
from ..emoji_artists.demo import ARTISTS, SAMPLER
from ..emoji_artists.evaluate import Question, questions, r_precision
from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import patchify
from .tables import command_of, grid, machine, parser_of, publish

GUIDANCES = (1.0, SAMPLER.guidance)
TRIPS = ((1.0, 1.0), (2.5, 1.0), (2.5, 2.5), (7.5, 1.0), (7.5, 7.5))


def round_trip(attributor: Attributor, asked: Sequence[Question], under: float) -> dict[str, float]:
    """Relative distances of inverted states from the generation's own."""
    specs = [question.concept().present for question in asked]
    generation = attributor.generate(specs, list(range(len(specs))))
    inverted = attributor.invert(specs, generation.latents, guidance=under)
    usable = generation.states[len(generation.states) - len(inverted.states) :]
    errors = []
    for mine, theirs in zip(inverted.states, usable, strict=True):
        apart = (mine.x_t - theirs.x_t).flatten(1).norm(dim=1)
        errors.append(float((apart / theirs.x_t.flatten(1).norm(dim=1)).median()))
    return {
        "generated under": attributor.sampler.guidance,
        "inverted under": under,
        "most noise": round(errors[0], 4),
        "median of states": round(float(torch.tensor(errors).median()), 4),
        "least noise": round(errors[-1], 4),
        "length of the noisiest": round(length(inverted.states[0].x_t), 4),
        "of the generation's": round(length(usable[0].x_t), 4),
    }


def length(states: Tensor) -> float:
    """The median root mean square of states [B, ...]; of pure noise it is 1."""
    return float(states.flatten(1).square().mean(1).sqrt().median())


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.inversion", __doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--pairs", type=int, default=64)
    args = parser.parse_args(argv)
    module, data = EmojiDiffusion("lora"), EmojiArtists("new", list(ARTISTS))
    asked = questions(data.held_out[: args.pairs])
    concepts = [question.concept() for question in asked]
    real = patchify(data.held_out_set.images[: args.pairs]).repeat_interleave(2, 0)

    def attributor(sampler: Sampler, given: str = "inverted") -> Attributor:
        store = args.demo / "traces" / "concept_trak"
        options: dict[str, Any] = {"given": given, "record": False}
        return Attributor(store, module, sampler=sampler, **options)

    def scored(attributor: Attributor, query: Query) -> list[Tensor]:
        return [result.scores for result in attributor.score(query)]

    trips = []
    for made, under in TRIPS:
        guided = attributor(replace(SAMPLER, guidance=made))
        trips.append(round_trip(guided, asked[:32:2], under))
        print(trips[-1], flush=True)
    own, noising = attributor(SAMPLER), attributor(SAMPLER, "noised")
    scores: dict[str, list[Tensor]] = {}
    for guidance in GUIDANCES:
        inverted = own.invert([concept.present for concept in concepts], real, guidance=guidance)
        query = own.query(concepts, generation=inverted)
        scores[f"inverted, guidance {guidance:g}"] = scored(own, query)
    scores["noised"] = scored(noising, noising.query_given(concepts, real))
    generated = scored(own, own.query(concepts, [i // 2 for i in range(len(asked))]))
    scores["generated images instead"] = generated
    rows = []
    for name, found in scores.items():
        precision = r_precision(asked, found, own.store.samples)
        like = float(spearman(torch.stack(found), torch.stack(generated)).mean())
        rows.append([name, *(f"{value:.3f}" for value in (*precision.values(), like))])
    lines = [
        f"`{command_of(parser, args)}`, on the traces of `ctrak demo`; {machine()}; {len(asked)} "
        f"questions about the real drawings of {args.pairs} held-out pairs.",
        "",
        *grid(["states of the drawing", *KINDS, "like the generated image's"], rows),
        "",
        "Relative distance of inverted states from those of the generation, 16 generated images, "
        "medians:",
        "",
        *grid(list(trips[0]), ([f"{value:g}" for value in trip.values()] for trip in trips)),
    ]
    publish(args.results / "inversion.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
