"""AbC, Attribution by Customization (Wang et al. 2023, arXiv 2306.09345): are the exemplars that a
model was customised on found among a pool of other images?

python -m recipes.benchmarks.by_customization --root DATA/abc --tasks all_tasks.json --model FOLDER

For every customised model of the tasks: fine-tunes a LoRA on its exemplars, generates the queries'
images, traces exemplars and pool, asks every method, and writes `results/by_customization.md`.
Finished models are not repeated. Neither data nor model are in this repository; by_customization.md
says where they come from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ctrak_lightning import Concept, Sampler
from ctrak_lightning.attribution.baselines import image_similarity
from ctrak_lightning.metrics import functional

from ..pictures import image_grid, read_square, to_float
from ..text_to_image_lora.module import TextToImageLoRA
from .compare import Case, Variant, answers_folder, compare
from .replay import SaveTrained, evenly, finished, fitted, load_trained, record
from .tables import RETRIEVAL, Figures, Table, command_of, machine, parser_of, publish
from .variants import table_variants

TOKEN = "<new1>"
PUBLISHED = "dataset/"
POOL = "laion_subset"
LAYOUT = f"expected <root>/json/<test case>.json, <root>/exemplar/... and <root>/{POOL}/"
TIMESTEPS = 5
CHECKPOINTS = 2
K = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Customisation:
    """A model to tune and what is asked of it.

    Args:
        folder: a folder name of its own.
        name: the published ``class_id``.
        exemplars: the images it is tuned on, paths under the root; ``train_prompt`` captions them.
        prompts: of the queries.
    """

    folder: str
    name: str
    exemplars: list[str]
    train_prompt: str
    prompts: list[str]


def read_tasks(root: Path, path: Path) -> list[Customisation]:
    """Reads a file of queries: a list with ``prompt``, ``train_prompt``, ``test_case``,
    ``test_case_ind`` and ``synth_image_path`` for each. ``<root>/json/<test case>.json`` has the
    exemplars; published paths begin with ``dataset/``, which stands for the root.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of that form, a query names no entry of its test case or lacks the
            token, an entry has no exemplar, or two captions for them.
    """
    found: dict[str, Customisation] = {}
    for number, item in enumerate(_json(path)):
        try:
            case, index = item["test_case"], int(item["test_case_ind"])
            entry = _json(root / "json" / f"{case}.json")[index]
            made = [image for images in entry["synth"].values() for image in images]
            new = Customisation(
                folder=f"{case}-{index:04d}",
                name=entry["class_id"],
                exemplars=[name.removeprefix(PUBLISHED) for name in entry["exemplar"]],
                train_prompt=item["train_prompt"],
                prompts=[],
            )
            # An index alone would pair a query with a wrong model in silence.
            is_its_own, prompt = item["synth_image_path"] in made, item["prompt"]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path}: query {number} or its entry is not of the published form ({error!r}). "
                "HINT: fetch both files anew."
            ) from error
        known = found.setdefault(new.folder, new)
        if not is_its_own or not new.exemplars or known.train_prompt != new.train_prompt:
            raise ValueError(
                f"{path}: query {number}: entry {index} of {case} lists no such image, or has no "
                "exemplar, or two captions for them. HINT: use files of the same release."
            )
        for text in (prompt, new.train_prompt):
            without_token(text)
        known.prompts.append(prompt)
    return list(found.values())


def without_token(prompt: str) -> str:
    """The prompt with the personalised token taken out: the counter-condition.

    Raises:
        ValueError: the token is not in it.
    """
    words = prompt.split()
    if TOKEN not in words:
        raise ValueError(f"Prompt {prompt!r} lacks {TOKEN}, so there is no concept to take out.")
    return " ".join(word for word in words if word != TOKEN)


def read_pool(root: Path, images: int, seed: int) -> list[str]:
    """Paths under the root of ``images`` pool images, chosen by ``seed`` (all if 0), sorted.

    Raises:
        ValueError: it has fewer images.
    """
    names = sorted(path.relative_to(root).as_posix() for path in (root / POOL).glob("*.*"))
    wanted = images or len(names)
    if not 1 <= wanted <= len(names):
        raise ValueError(f"{root / POOL}: {len(names)} images, asked for {wanted}; {LAYOUT}.")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return sorted(names[i] for i in order[:wanted].tolist())


class Images(Dataset[dict[str, Any]]):
    """One item per image, cut to its centre square; its path under the root is its id."""

    def __init__(self, root: Path, captions: Mapping[str, str], size: int) -> None:
        self.root, self.captions, self.size = root, dict(captions), size
        self.paths = list(captions)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        image = to_float(read_square(self.root / path, self.size))
        return {"image": image, "caption": self.captions[path], "sample_id": path}


class AbC(L.LightningDataModule):
    """The data of one customised model: it is tuned on its exemplars; exemplars and pool are
    traced, the pool with the empty prompt.

    Raises:
        ValueError: the pool holds an exemplar, so that hits could not be counted.
    """

    def __init__(
        self, root: Path, task: Customisation, pool: Sequence[str], size: int, batch_size: int
    ) -> None:
        super().__init__()
        exemplars = dict.fromkeys(task.exemplars, task.train_prompt)
        if shared := sorted(set(exemplars) & set(pool)):
            raise ValueError(f"AbC: {shared[:3]} are exemplars and pool at once.")
        self.batch_size = batch_size
        self.train_set = Images(root, exemplars, size)
        self.traced_set = Images(root, exemplars | dict.fromkeys(pool, ""), size)
        self.relevant = torch.arange(len(self.traced_set)) < len(exemplars)  # bool [N]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        # The exemplars are few, so they are drawn with replacement.
        drawn = RandomSampler(self.train_set, replacement=True, num_samples=100 * self.batch_size)
        return DataLoader(self.train_set, self.batch_size, sampler=drawn)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the exemplars, then the pool."""
        return DataLoader(self.traced_set, self.batch_size)


def figures(scores: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """The figures of scores [Q, N] of one customised model, one value per query [Q]; which images
    are exemplars: bool [N].

    ``recall@10`` is hits over min(10, exemplars), so that 1 can be reached; the published
    evaluation divides by all exemplars, which is the figure ``recall@10 of all``.
    """
    expanded, exemplars = relevant.expand(scores.shape), int(relevant.sum())
    recall = functional.recall_at_k(scores, expanded, K)
    rest = {name: RETRIEVAL[name](scores, expanded) for name in ("mAP", "R-precision")}
    return {"recall@10": recall, "recall@10 of all": recall * min(K, exemplars) / exemplars} | rest


def ask(
    folder: Path, task: Customisation, data: AbC, rows: Sequence[Variant], args: Any
) -> dict[str, dict[str, Figures]]:
    """The rows of one customised model: their figures by damping."""
    names = ("model", "size", "rank", "steps", "batch_size", "seed")
    arguments = {name: getattr(args, name) for name in names}
    arguments |= {"exemplars": task.exemplars, "train_prompt": task.train_prompt}
    L.seed_everything(args.seed, verbose=False)
    module = TextToImageLoRA(args.model, rank=args.rank, resolution=args.size)
    steps = evenly(args.steps, CHECKPOINTS)
    if not finished(folder, arguments):
        folder.mkdir(parents=True, exist_ok=True)
        options = {"accelerator": args.device, "devices": 1, "default_root_dir": folder}
        fitted(module, data, steps[-1], SaveTrained(folder, steps), **options)
        record(folder, {"arguments": arguments})
    load_trained(module.eval().to(args.device), folder, steps[-1])
    concepts = [
        Concept(task.name, prompt, without_token(prompt), alone=task.train_prompt)
        for prompt in task.prompts[: args.queries]
    ]
    case = Case(
        folder=folder,
        module=module,
        batches=data.trace_dataloader(),
        concepts=concepts,
        seeds=list(range(len(concepts))),
        sampler=Sampler(steps=args.sampling_steps, guidance=args.guidance),
        batch_size=args.batch_size,
    )
    asked = (data.traced_set.paths, task.prompts, args.sampling_steps, args.guidance)
    found, images = compare(case, rows, answers_folder(folder, *asked))
    image_grid(folder / "queries.png", images, columns=min(8, len(images)), scale=1)
    told = data.relevant.float().expand(len(concepts), -1)
    shown = [(batch["image"] + 1) / 2 for batch in data.trace_dataloader()]
    plain = {
        "caption_search": told,
        "pixel_similarity": torch.cat([image_similarity(images, real) for real in shown], 1),
        "chance": torch.zeros_like(told),
    }
    every = found | {name: {"None": scores} for name, scores in plain.items()}
    return {
        name: {damping: figures(scores, data.relevant) for damping, scores in grid.items()}
        for name, grid in every.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.by_customization", __doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True, help="file of the queries' prompts")
    parser.add_argument("--model", required=True, help="as recipes.pipelines.load takes it")
    parser.add_argument("--pool", type=int, default=1000, help="pool images; 0 for all")
    parser.add_argument("--models", type=int, default=None, help="the first; all by default")
    parser.add_argument("--queries", type=int, default=None, help="of each model; all by default")
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    parser.add_argument("--steps", type=int, default=250, help="optimiser steps of each model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=None, help="rows; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/by_customization"))
    args = parser.parse_args(argv)
    tasks = read_tasks(args.root, args.tasks)[: args.models]
    pool = read_pool(args.root, args.pool, args.seed)
    steps = evenly(args.steps, CHECKPOINTS)
    rows = table_variants(TIMESTEPS, steps, args.methods, scopes=("local", "global"))
    honest = {row.name: row.damping for row in rows}
    parts = []
    for task in tasks:
        data = AbC(args.root, task, pool, args.size, args.batch_size)
        parts.append(ask(args.runs / task.folder, task, data, rows, args))
    table = Table()
    for name, grid in parts[0].items():
        joined = {
            damping: {key: torch.cat([each[name][damping][key] for each in parts]) for key in first}
            for damping, first in grid.items()
        }
        table.add(name, joined, honest.get(name, "None"))
    head = (
        f"`{command_of(parser, args)}`; {machine()}. {len(tasks)} customised models, {len(pool)} "
        "pool images with the empty prompt. Whether a generated image shows its concept is judged "
        "by nobody: look at queries.png of each run.\n"
    )
    publish(args.results / "by_customization.md", table.page(head))


def _json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {LAYOUT}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no valid JSON ({error}). HINT: fetch the file anew.") from error


if __name__ == "__main__":
    main()
