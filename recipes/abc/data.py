"""Attribution by Customization (Wang et al. 2023, arXiv 2306.09345): exemplars, queries and the pool, as they are published."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from recipes.pictures import read_square
from recipes.synthetic.data import to_float

TOKEN = "<new1>"
PUBLISHED_PREFIX = "dataset/"
POOL = "laion_subset"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LAYOUT = (
    f"expected <root>/json/<test case>.json, <root>/exemplar/..., and the pool in <root>/{POOL}/, as "
    "PeterWang512/GenDataAttribution publishes them"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One customised model of a test case.

    Args:
        test_case: such as ``"test_artchive"``.
        index: its place in the test case's file.
        name: the published ``class_id``.
        exemplars: the images it is tuned on, paths under the root.
        synthesised: the images the published model made, paths under the root (they need not be there).
    """

    test_case: str
    index: int
    name: str
    exemplars: tuple[str, ...]
    synthesised: frozenset[str]

    @property
    def folder(self) -> str:
        """A folder name of its own."""
        return f"{self.test_case}-{self.index:04d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Customisation:
    """A model to tune and what is asked of it: its ``entry``, the caption of the exemplars, and the queries' prompts."""

    entry: Entry
    train_prompt: str
    prompts: tuple[str, ...]


def read_test_case(root: Path, name: str) -> list[Entry]:
    """Reads ``<root>/json/<name>.json``: a list with ``exemplar`` (paths), ``synth`` (paths by kind of prompt) and
    ``class_id`` for each customised model. Published paths begin with ``dataset/``, which stands for the root.

    Raises:
        FileNotFoundError: the file, or an exemplar, is not there.
        ValueError: the file is not of that form, or a model has no exemplar, so that a query of it had no positive sample.
    """
    path = root / "json" / f"{name}.json"
    listed = _json(path)
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected a list with an object for each customised model.")
    entries = []
    for index, item in enumerate(listed):
        try:
            exemplars = tuple(_under_root(p) for p in item["exemplar"])
            synthesised = frozenset(_under_root(p) for paths in item["synth"].values() for p in paths)
            entry = Entry(
                test_case=name,
                index=index,
                name=item["class_id"],
                exemplars=exemplars,
                synthesised=synthesised,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: entry {index} is not of the published form ({error!r}); expected the fields exemplar (a list of "
                "paths), synth (lists of paths by kind) and class_id."
            ) from error
        if not exemplars:
            raise ValueError(
                f"{path}: entry {index} ({entry.name}) has no exemplar, so its queries have no positive sample. HINT: fetch the "
                "file anew, or leave the entry out of the tasks."
            )
        entries.append(entry)
    return entries


def read_tasks(
    root: Path, path: Path, models: int | None = None, queries: int | None = None
) -> list[Customisation]:
    """Reads a file of queries: a list with ``prompt``, ``train_prompt``, ``test_case``, ``test_case_ind`` and
    ``synth_image_path`` for each (``custom_diffusion/tasks/all_tasks.json`` of PeterWang512/AttributeByUnlearning).

    Args:
        root: the data set.
        path: the file.
        models: how many customised models to keep, in the order of the file; all by default.
        queries: how many queries of each to keep; all by default.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a query is not of that form, names no entry of its test case, lacks the token, or repeats another
            caption for the exemplars.
    """
    listed = _json(path)
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected a list with an object for each query.")
    cases: dict[str, list[Entry]] = {}
    grouped: dict[tuple[str, int], tuple[Entry, str, list[str]]] = {}
    for number, item in enumerate(listed):
        try:
            case, index, made = item["test_case"], int(item["test_case_ind"]), item["synth_image_path"]
            prompt, train_prompt = item["prompt"], item["train_prompt"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: query {number} is not of the published form ({error!r}); expected prompt, train_prompt, test_case, "
                "test_case_ind and synth_image_path."
            ) from error
        if case not in cases:
            cases[case] = read_test_case(root, case)
        entry = cases[case][index] if 0 <= index < len(cases[case]) else None
        # An index alone would pair a query with a wrong model in silence; the image's path shows whose it is.
        if entry is None or _under_root(made) not in entry.synthesised:
            raise ValueError(
                f"{path}: query {number} is said to be of entry {index} of {case} ({len(cases[case])} entries), which does not "
                f"list {made}. HINT: use tasks and test cases of the same release."
            )
        for text in (prompt, train_prompt):
            without_token(text)
        _, known, prompts = grouped.setdefault((case, index), (entry, train_prompt, []))
        if known != train_prompt:
            raise ValueError(
                f"{path}: entry {index} of {case} has two captions for its exemplars, {known!r} and {train_prompt!r}."
            )
        prompts.append(prompt)
    return [
        Customisation(entry=entry, train_prompt=train_prompt, prompts=tuple(prompts[:queries]))
        for entry, train_prompt, prompts in list(grouped.values())[:models]
    ]


def without_token(prompt: str) -> str:
    """The prompt with the personalised token taken out: the counter-condition.

    Raises:
        ValueError: the token is not in it.

    Example:
        >>> without_token("A school of <new1> fish")
        'A school of fish'
    """
    words = prompt.split()
    if TOKEN not in words:
        raise ValueError(f"Prompt {prompt!r} lacks the token {TOKEN}, so there is no concept to take out.")
    return " ".join(word for word in words if word != TOKEN)


def read_pool(root: Path, images: int | None, seed: int) -> list[str]:
    """Paths under the root of ``images`` pool images, chosen by ``seed`` (all if None), sorted.

    Raises:
        FileNotFoundError: there is no pool.
        ValueError: it has fewer images.
    """
    folder = root / POOL
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {LAYOUT}.")
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    wanted = len(names) if images is None else images
    if not 1 <= wanted <= len(names):
        raise ValueError(
            f"{folder}: {len(names)} images, asked for {wanted}. HINT: a smaller --pool, at least 1."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return sorted(f"{POOL}/{names[i]}" for i in order[:wanted].tolist())


def read_captions(path: Path, pool: Sequence[str]) -> dict[str, str]:
    """Captions of the pool by path under the root, from a JSON object of file name -> caption.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such object, or a caption is missing.
    """
    listed = _json(path)
    if not isinstance(listed, dict) or not all(isinstance(text, str) for text in listed.values()):
        raise ValueError(f"{path}: expected a JSON object of file names and captions.")
    missing = [name for name in pool if Path(name).name not in listed]
    if missing:
        raise ValueError(
            f"{path}: no caption for {len(missing)} of {len(pool)} pool images, the first {missing[:3]}. HINT: caption them, or "
            "leave --captions out to trace the whole pool with the empty prompt."
        )
    return {name: listed[Path(name).name] for name in pool}


class Images(Dataset[dict[str, Any]]):
    """One item per image: float [3, size, size] in [-1, 1], ``caption``, ``kind`` and ``sample_id`` (its path).

    Args:
        root: the data set.
        paths: of the images under the root.
        captions: by path.
        kind: ``"exemplar"`` or ``"pool"``, by path.
        size: height and width in pixels.

    Raises:
        FileNotFoundError: an image is missing.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        captions: Mapping[str, str],
        kind: Mapping[str, str],
        size: int,
    ) -> None:
        missing = [path for path in paths if not (root / path).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{root}: {len(missing)} of {len(paths)} images are missing, the first {missing[:3]}; {LAYOUT}."
            )
        self.root, self.paths, self.captions, self.kind, self.size = root, list(paths), captions, kind, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {
            "image": to_float(read_square(self.root / path, self.size)),
            "caption": self.captions[path],
            "kind": self.kind[path],
            "sample_id": path,
        }


class AbC(L.LightningDataModule):
    """The data of one customised model: it is tuned on its exemplars; exemplars and pool are traced.

    Args:
        root: the data set.
        customisation: the model.
        pool: paths of the pool under the root.
        captions: of the pool, by path.
        size: height and width in pixels; images are cut to their centre square.
        batch_size: images per batch.
        steps: optimiser steps of an epoch (the exemplars are few, so they are drawn with replacement).

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: the pool holds an exemplar.
    """

    def __init__(
        self,
        root: Path,
        customisation: Customisation,
        pool: Sequence[str],
        captions: Mapping[str, str],
        size: int,
        batch_size: int,
        steps: int,
    ) -> None:
        super().__init__()
        exemplars = customisation.entry.exemplars
        if shared := sorted(set(exemplars) & set(pool)):
            raise ValueError(
                f"AbC: {shared[:3]} are exemplars and pool at once, so hits could not be counted."
            )
        texts = {**captions, **dict.fromkeys(exemplars, customisation.train_prompt)}
        kind = {**dict.fromkeys(pool, "pool"), **dict.fromkeys(exemplars, "exemplar")}
        self.train_set = Images(root, exemplars, texts, kind, size)
        self.traced_set = Images(root, [*exemplars, *pool], texts, kind, size)
        self.batch_size, self.steps = batch_size, steps

    def relevant(self) -> torch.Tensor:
        """Which traced images are exemplars, bool [N]."""
        return torch.tensor([self.traced_set.kind[path] == "exemplar" for path in self.traced_set.paths])

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        drawn = RandomSampler(self.train_set, replacement=True, num_samples=self.steps * self.batch_size)
        return DataLoader(self.train_set, self.batch_size, sampler=drawn)

    def trace_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The samples to trace: the exemplars, then the pool."""
        return DataLoader(self.traced_set, self.batch_size)


def _under_root(path: str) -> str:
    return path.removeprefix(PUBLISHED_PREFIX)


def _json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {LAYOUT}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no valid JSON ({error}). HINT: fetch the file anew.") from error
