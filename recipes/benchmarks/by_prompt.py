"""Who taught the object, and who the artist, of every held-out pair: asked by prompt.

python -m recipes.benchmarks.by_prompt                 # the demo's four artists, one seed
python -m recipes.benchmarks.by_prompt --artists all --seeds 0 1 2

Fine-tunes what is missing, traces, generates, asks, and writes `results/by_prompt.md` and `.png`.
Resumable: what is finished in `--runs` is not done again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ctrak_lightning import Concept, Sampler
from ctrak_lightning.attribution import Attributions
from ctrak_lightning.attribution.baselines import image_similarity, text_search

from ..emoji_artists import evaluate
from ..emoji_artists.data import KINDS
from ..emoji_artists.demo import ARTISTS
from ..emoji_artists.network import patchify
from ..emoji_artists.sheets import contact_sheet
from ..emoji_text.captions import ARTIST_ONLY, BOTH, OBJECT_ONLY, caption, words
from ..emoji_text.data import EmojiCaptions
from ..emoji_text.module import EmojiText
from ..emoji_text.pipeline import MAX_TOKENS
from ..text import read_text
from .compare import Case, Variant, answers, answers_folder, compare
from .emoji import relevance, retrieval
from .judge import EmojiJudge
from .replay import SaveTrained, finished, fitted, load_trained, record
from .tables import Table, command_of, machine, parser_of, publish
from .variants import table_variants

STEPS = (96, 192, 288)
TIMESTEPS = 3
SAMPLER = Sampler(steps=20, guidance=2.5)
DEFAULT = "concept_trak"
METHODS = (DEFAULT, "concept_trak_norm", "concept_trak_paper", "trak", "d_trak", f"{DEFAULT}_given")
SHEET = ("christmas-tree", "twemoji")
REWORDED = "object in other words"
OTHER_WORDS = {
    "alembic": "distillation flask",
    "bellhop-bell": "reception ringer",
    "christmas-tree": "noel fir",
    "circus-tent": "big top",
    "clutch-bag": "purse",
    "cooked-rice": "steamed grain dish",
    "deer": "stag",
    "fire": "flame",
    "french-fries": "fried chips",
    "funeral-urn": "vase of ashes",
    "glass-of-milk": "cup of dairy",
    "jack-o-lantern": "carved halloween pumpkin",
    "koala": "australian marsupial",
    "lipstick": "lip makeup",
    "mushroom": "toadstool",
    "package": "cardboard parcel",
    "palm-tree": "coconut plant",
    "pool-8-ball": "billiards sphere",
    "rabbit": "bunny",
    "roller-coaster": "amusement ride",
    "shamrock": "irish trefoil",
    "statue-of-liberty": "new york monument",
    "studio-microphone": "recording mic",
    "tangerine": "mandarin citrus",
    "top-hat": "magician headwear",
}
"""What some of the new objects are called in words that no caption used; the images still are of
the words above."""
COLUMNS = tuple(
    f"{metric}, {group}" for metric in ("R-precision", "P@10") for group in (*KINDS, REWORDED)
)


@dataclass(frozen=True)
class Question(evaluate.Question):
    """A held-out pair, as the prompt that draws it, and one of its two concepts."""

    @property
    def asked(self) -> str:
        """The concept's words."""
        return words(self.value)

    @property
    def prompt(self) -> str:
        return caption(BOTH[0], self.object, self.artist)

    def concept(self) -> Concept:
        """The prompt against the prompt without the concept's words; alone it is a caption that
        training shows."""
        template = OBJECT_ONLY[0] if self.kind == "object" else ARTIST_ONLY[0]
        alone = caption(template, self.asked, self.asked)
        return Concept.from_prompt(self.prompt, self.asked, alone=alone)


@dataclass(frozen=True)
class Reworded(Question):
    """The object of a held-out pair, asked in other words."""

    @property
    def group(self) -> str:
        return REWORDED

    @property
    def asked(self) -> str:
        return OTHER_WORDS[self.object]

    @property
    def prompt(self) -> str:
        return caption(BOTH[0], self.asked, self.artist)


def questions(pairs: Sequence[tuple[str, str]]) -> list[Question]:
    """Both concepts of every held-out pair, the pair's two next to each other; then the objects in
    other words, where there are some."""
    plain = [Question(name, artist, kind) for name, artist in pairs for kind in KINDS]
    others = [Reworded(name, artist, "object") for name, artist in pairs if name in OTHER_WORDS]
    return [*plain, *others]


def exact_words(asked: Sequence[Question], captions: Sequence[str]) -> Tensor:
    """1 where a caption holds the concept's words as whole words [Q, N], else 0. ("noto" is in
    "noto v1" too.)"""
    texts = [f" {text.replace(',', ' ')} " for text in captions]
    return torch.tensor([[float(f" {q.asked} " in text) for text in texts] for q in asked])


@torch.no_grad()
def sentence_vectors(texts: Sequence[str]) -> Tensor:
    """MiniLM's sentence embeddings [n, 384] of unit norm: the mean of the words' states, as it was
    trained to be used."""
    tokenizer, encoder = read_text(MAX_TOKENS)
    vectors = []
    for start in range(0, len(texts), 64):
        tokens = tokenizer(list(texts[start : start + 64]), padding=True, return_tensors="pt")
        states, mask = encoder(**tokens)[0], tokens["attention_mask"].unsqueeze(-1)
        vectors.append((states * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(vectors), dim=1)


def fine_tune(
    folder: Path, seed: int, data: EmojiCaptions, steps: Sequence[int] = STEPS
) -> EmojiText:
    """The base fine-tuned on the captions for ``steps[-1]`` steps, with the weights of the last; a
    finished run is loaded. ``folder`` gets the weights at each of ``steps``."""
    L.seed_everything(seed, verbose=False)
    module = EmojiText()
    arguments = {"seed": seed, "steps": list(steps), "images": len(data.train_set)}
    if not finished(folder, arguments):
        folder.mkdir(parents=True, exist_ok=True)
        trainer = fitted(module, data, steps[-1], SaveTrained(folder, steps))
        record(folder, {"arguments": arguments, "loss": float(trainer.callback_metrics["loss"])})
    load_trained(module, folder, steps[-1])
    return module.eval()


def baselines(asked: Sequence[Question], data: EmojiCaptions, images: Tensor) -> dict[str, Tensor]:
    """Rankings [Q, N] by the captions' words, by their embeddings, and by the image's looks."""
    names = [q.asked if q.kind == "object" else f"by {q.asked}" for q in asked]
    shown, captions = (data.train_set.images + 1) / 2, data.train_set.captions
    similar = text_search(names, captions, sentence_vectors)
    features = EmojiJudge.trained().features
    return {
        "label search: the concept's words in the caption": exact_words(asked, captions),
        "label search: MiniLM's similarity to the caption": similar,
        "features of a supervised classifier": image_similarity(images, shown, features),
    }


def case_of(
    folder: Path, module: EmojiText, data: EmojiCaptions, asked: Sequence[Question]
) -> Case:
    """Both concepts of a pair are asked of the same image."""
    rows = [data.held_out.index((q.object, q.artist)) for q in asked]
    return Case(
        folder=folder,
        module=module,
        batches=data.trace_dataloader(),
        concepts=[q.concept() for q in asked],
        seeds=rows,
        sampler=SAMPLER,
        given=patchify(data.held_out_images)[rows],
    )


def together(results: Attributions, prompts: Sequence[object]) -> str:
    """How far the two concepts of a pair are the same question: the mean cosine of their gradients,
    and how many of the ten best images they share."""
    pairs = [i for i in range(len(prompts) - 1) if prompts[i] == prompts[i + 1]]
    each = [Attributions(results[i : i + 2], results.cosines[i : i + 2, i : i + 2]) for i in pairs]
    cosine = sum(float(one.cosines[0, 1]) for one in each) / len(each)
    shared = sum(len(one.shared(10)) for one in each) / len(each)
    return f"mean cosine {cosine:.2f}, {shared:.1f} of the ten best images shared"


def draw(
    path: Path, data: EmojiCaptions, asked: Sequence[Question], images: Tensor, found: Attributions
) -> None:
    """The contact sheet of one pair."""
    pairs = [(q.object, q.artist) for q in asked]
    i = pairs.index(SHEET) if SHEET in pairs else 0
    real = (data.held_out_images[data.held_out.index(pairs[i])] + 1) / 2
    shown = [replace(found[row], image=images[row]) for row in range(i, i + len(KINDS))]
    contact_sheet(path, shown, real, KINDS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.by_prompt", __doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--artists", default=",".join(ARTISTS), help="comma-separated, or 'all'")
    parser.add_argument("--pairs", type=int, default=64, help="the first so many held-out pairs")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="rows of the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji_text"))
    args = parser.parse_args(argv)
    data = EmojiCaptions(None if args.artists == "all" else args.artists.split(","))
    pairs, shown = data.held_out[: args.pairs], data.train_set.pairs
    asked = questions(pairs)
    chosen: list[Variant] = table_variants(TIMESTEPS, STEPS, args.methods)
    table, counts, shared = Table(COLUMNS), [], []
    for seed in args.seeds:
        folder = args.runs / f"seed-{seed}"
        case = case_of(folder, fine_tune(folder, seed, data), data, asked)
        facts = [[each.to_dict() for each in case.concepts], case.seeds, data.train_set.captions]
        out = answers_folder(folder, *facts)
        found, images = compare(case, chosen, out)
        counts.append(EmojiJudge.trained().recognised(images, asked))
        plain = {name: {"None": row} for name, row in baselines(asked, data, images).items()}
        honest = {row.name: row.damping for row in chosen}
        table.fill(plain | found, lambda scores: retrieval(asked, scores, shown), honest)
        default = next(row for row in chosen if row.name == DEFAULT)
        ((_, attributor, query),) = answers(case, [default], out)
        results = attributor.score(query)
        shared.append(together(results, [concept.present for concept in query.concepts]))
        if seed == args.seeds[0]:
            draw(args.results / "by_prompt.png", data, asked, images, results)
    truth = relevance(asked, shown).float().mean(1)
    chance = [float(truth[torch.tensor([q.group == kind for q in asked])].mean()) for kind in KINDS]
    each = int(relevance(asked[:1], shown).sum())
    seen = {kind: ", ".join(str(count[kind]) for count in counts) for kind in KINDS}
    head = (
        f"`{command_of(parser, args)}`; {machine()}; {len(shown)} training images, {len(pairs)} "
        f"held-out pairs.\nChance: object {chance[0]:.3f}, artist {chance[1]:.3f}. An object has "
        f"{each} images, so its P@10 is at most {each / 10:.2f}. The two concepts of one prompt: "
        f"{'; '.join(shared)}.\n\nOf the {len(pairs)} generated images an independent classifier "
        f"recognises the object in {seen['object']}, the artist in {seen['artist']}.\n"
    )
    publish(args.results / "by_prompt.md", table.page(head))


if __name__ == "__main__":
    main()
