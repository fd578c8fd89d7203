"""Ten thousand stores, tables, ledgers, weights, configurations and questions that no honest
program makes.

python -m tests.stress.inputs --cases 10000

Each must end in one of the library's typed errors; or in being told, by `TraceStore.verify` or
`ctrak verify`; or in a result that is the sound store's: the same ranking, scores, owners, shares
and steps, of a ledger the same entries, and a table of samples as it was given. (What was altered
with all its hashes cannot be told from what was written so, but by the ledger; such a store is
told, and may answer otherwise.) Counted apart: other answers, other exceptions, crashes of the
process, hangs (over ten seconds of the processor, or two minutes), allocations beyond a gigabyte,
writes outside the store's folder, and anything that would run code from a file (unpickling,
``exec``, a subprocess, a socket, an import that only a hostile store brings about), which Python's
audit hooks tell.

Files are altered as by a hostile hand: the manifest is given the sizes and hashes of what was
altered.
"""

import argparse
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml

from ctrak_lightning import Attributor, Concept, Sampler, TraceStore
from ctrak_lightning.cli.question import load_module, parse_spec
from ctrak_lightning.errors import (
    BatchError,
    ConceptError,
    GradientError,
    MethodError,
    StoreError,
    TaskError,
)
from ctrak_lightning.provenance import Ledger, verify
from ctrak_lightning.store import SampleTable, TraceWriter
from ctrak_lightning.store.manifest import manifest_text, parse_manifest
from tests.stress.figures import RESULTS, keep
from tests.stress.subject import fine_tune
from tests.toy import COLOURS, SHAPES

TYPED = (StoreError, ConceptError, TaskError, BatchError, GradientError, MethodError)
ROOT = Path(__file__).parent.parent.parent
SECONDS, BYTES = 10, 2**30
BATCH = 50
"""Cases to a process: a crash costs the rest of its batch, which is then made one by one."""

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), -0.0, 0.5,
    "", " ", ".", "..", "/", "../../outside/x", "/tmp/ctrak-outside", "a/../../b", "C:\\x", "checkpoint-00000003/../../x.h5",
    "\0", "a\0b", "\n", "\r\n", "x" * 10_000, "\U0001f4a5\U0001f431", "\u202egnp.exe", "\u0000\ufeff", "\ud7ff", "é" * 300,
    "%s%n%x", "{0.__class__}", "<script>alert(1)</script>", "'; DROP TABLE samples; --", "=cmd|' /C calc'!A0", "__import__('os')",
    [], {}, [[]], [None], {"": None}, {"class": "Popen"}, [0] * 1000, [[[[[[[[[[1]]]]]]]]]],
)  # fmt: skip
TEXTS = [value for value in NASTY if isinstance(value, str)]


class Workplace:
    """A sound store, and the model that it was made with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        module = fine_tune(root / "run")
        self.sound = root / "run" / "traces"
        self.module = module
        self.outside = root / "outside"
        self.outside.mkdir()
        self.store = root / "store"
        self.told: list[str] = []
        self.watch = Watch(self)
        self.entries = Ledger(self.sound).entries()
        self.expected = self._answer(TraceStore(self.sound))

    def fresh(self) -> Path:
        """A copy of the sound store."""
        self.clear()
        shutil.copytree(self.sound, self.store)
        return self.store

    def clear(self) -> None:
        watched, self.watch.on = self.watch.on, False
        shutil.rmtree(self.store, ignore_errors=True)
        self.watch.on = watched

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.store / "manifest.json").read_text())
        return found

    def record(self, name: str) -> None:
        """Gives the manifest the size and hash that a file has now."""
        manifest = self.manifest()
        if name not in manifest["files"]:  # the ledger's own, which the manifest does not vouch for
            return
        content = (self.store / name).read_bytes()
        manifest["files"][name] |= {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        # As the library writes it, so that nothing but what was altered is told.
        text = json.dumps(manifest)
        (self.store / "manifest.json").write_text(
            manifest_text(parse_manifest(text, "manifest.json"))
        )

    def files(self, suffix: str) -> list[str]:
        return sorted(str(path.relative_to(self.sound)) for path in self.sound.rglob(f"*{suffix}"))

    def use(self) -> None:
        """Everything that is done with a store.

        Raises:
            AssertionError: nothing is told of it, and it answers otherwise than the sound store.
        """
        store = TraceStore(self.store)
        self.told = store.verify()
        for checkpoint in store.checkpoints:
            (
                checkpoint.features(),
                checkpoint.losses(),
                checkpoint.norms(),
                checkpoint.kernel(),
                checkpoint.weights(),
            )
        self.told += verify(self.store)
        found = self._answer(store)
        if found != self.expected and not self.told:
            raise AssertionError(f"answered {found}, expected {self.expected}")
        self.told += ["other scores"] if found != self.expected else []

    def _answer(self, store: TraceStore) -> list[Any]:
        """The whole ranking and the streamed top of one question, with owners and shares."""
        attributor = Attributor(store, self.module, sampler=Sampler(steps=2), record=False)
        concept = Concept(
            "c", present={"colour": COLOURS[0], "shape": SHAPES[0]}, absent={"shape": SHAPES[0]}
        )
        query = attributor.query([concept])
        result = attributor.score(query)[0]
        ranking = [
            (each.sample_id, round(each.score, 5), each.metadata) for each in result.top(100)
        ]
        best = [(each.sample_id, round(each.score, 5)) for each in attributor.top(query, 3)[0]]
        try:
            shares = [
                (each.group, round(each.share, 5))
                for each in result.by_group("owner", resamples=10)
            ]
        except ValueError:  # the column is gone, or there is nothing positive to share out
            shares = []
        return [ranking, best, shares, result.steps]


def spot(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """A random container in a JSON value, and a key of it."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        inner = value[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.3:
            return value, key
        value = inner


def altered_json(value: Any, draw: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        holder, key = spot(value, draw)
        kind = draw.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(TEXTS)] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(draw.choice(NASTY))  # a list put into itself is no JSON
        if not value:
            break
    return value


def altered_bytes(content: bytes, draw: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        kind, at = draw.randrange(4), draw.randrange(len(found))
        if kind == 0:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[at : at + 8] = draw.randbytes(8)
        elif kind == 2:
            del found[at : at + draw.randrange(1, 64)]
        else:
            found[at:at] = draw.choice(
                (b"\0" * 16, b"\xff" * 8, draw.randbytes(draw.randrange(1, 64)))
            )
        if not found:
            break
    return bytes(found if draw.random() < 0.9 else found[: draw.randrange(len(found) + 1)])


def manifest_values(work: Workplace, draw: random.Random) -> None:
    store = work.fresh()
    (store / "manifest.json").write_text(json.dumps(altered_json(work.manifest(), draw)))
    work.use()


def manifest_bytes(work: Workplace, draw: random.Random) -> None:
    path = work.fresh() / "manifest.json"
    path.write_bytes(altered_bytes(path.read_bytes(), draw))
    work.use()


def hdf5_bytes(work: Workplace, draw: random.Random) -> None:
    store, name = work.fresh(), draw.choice(work.files(".h5"))
    (store / name).write_bytes(altered_bytes((store / name).read_bytes(), draw))
    work.record(name)
    work.use()


def hdf5_content(work: Workplace, draw: random.Random) -> None:
    store, name = work.fresh(), draw.choice(work.files(".h5"))
    with h5py.File(store / name, "r+") as file:
        names: list[str] = []
        file.visititems(
            lambda key, item: names.append(key) if isinstance(item, h5py.Dataset) else None
        )
        _replace(file, draw.choice(names), store, draw)
    work.record(name)
    work.use()


def _replace(file: h5py.File, name: str, store: Path, draw: random.Random) -> None:
    old = file[name][()]
    shape = np.shape(old)
    del file[name]
    kind = draw.randrange(9)
    if kind == 0:
        return
    if kind == 1:  # huge, and takes no room on disk
        file.create_dataset(name, shape=(2**40, *shape[1:]), dtype="f4", chunks=True)
    elif kind == 2:
        file.create_dataset(
            name, shape=(shape[0] if shape else 1, 2**38), dtype="f4", chunks=(1, 1024)
        )
    elif kind == 3:
        file[name] = h5py.ExternalLink(str(store.parent / "outside" / "x.h5"), "/x")
    elif kind == 4:
        file[name] = h5py.SoftLink("/" + name)
    elif kind == 5:
        file.create_dataset(
            name,
            data=[draw.choice(TEXTS).replace("\0", "") for _ in range(3)],
            dtype=h5py.string_dtype(),
        )
    elif kind == 6:
        file.create_dataset(
            name,
            data=np.asarray(
                old, dtype="f8" if np.issubdtype(np.asarray(old).dtype, np.number) else None
            ),
        ) if np.issubdtype(np.asarray(old).dtype, np.number) else file.create_group(name)
    elif kind == 7 and np.issubdtype(np.asarray(old).dtype, np.floating):
        file.create_dataset(
            name,
            data=np.full(shape, draw.choice((np.nan, np.inf, 3e38, 0.0)), np.asarray(old).dtype),
        )
    else:
        file.create_virtual_dataset(name, _virtual(store, shape))


def _virtual(store: Path, shape: tuple[int, ...]) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout(shape=shape or (1,), dtype="f4")
    layout[...] = h5py.VirtualSource(
        str(store.parent / "outside" / "x.h5"), "x", shape=shape or (1,)
    )
    return layout


def weights_bytes(work: Workplace, draw: random.Random) -> None:
    store, name = work.fresh(), draw.choice(work.files(".safetensors"))
    content = (store / name).read_bytes()
    if draw.random() < 0.5:
        length = int.from_bytes(content[:8], "little")
        header = altered_json(json.loads(content[8 : 8 + length]), draw)
        text = json.dumps(header).encode()
        content = (
            draw.choice((len(text), 2**62, 0)).to_bytes(8, "little") + text + content[8 + length :]
        )
    else:
        content = altered_bytes(content, draw)
    (store / name).write_bytes(content)
    work.record(name)
    work.use()


def ledger_lines(work: Workplace, draw: random.Random) -> None:
    path = work.fresh() / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if draw.random() < 0.5:
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(altered_json(json.loads(lines[at]), draw)).encode() + b"\n"
        path.write_bytes(b"".join(lines))
    else:
        path.write_bytes(altered_bytes(path.read_bytes(), draw))
    work.told = verify(work.store)
    if Ledger(work.store).entries() != work.entries and not work.told:
        raise AssertionError("the ledger says something else, and `verify` nothing")


def sample_ids(work: Workplace, draw: random.Random) -> None:
    """A table of such ids and metadata is refused, or comes back as it was given."""
    work.clear()
    n = draw.randrange(1, 5)
    ids = [
        draw.choice((*TEXTS, f"sample-{i}", f"{i}\U0001f4a5", draw.randbytes(6).decode("latin-1")))
        for i in range(n)
    ]
    columns = {
        draw.choice((*TEXTS, "owner", "licence")): [draw.choice(TEXTS) for _ in ids]
        for _ in range(draw.randrange(3))
    }
    header = copy.copy(TraceStore(work.sound).header)
    table = SampleTable(ids, [f"{i:064x}" for i in range(n)], columns)
    from dataclasses import replace

    header = replace(header, dataset=header.dataset | table.facts() | {"latent_shape": [3, 8, 8]})
    writer = TraceWriter(work.store, header)
    writer.write_samples(table)
    with writer.begin_checkpoint(1, epoch=0, weights={"w": torch.zeros(1)}) as checkpoint:
        checkpoint.append(torch.arange(n), torch.randn(n, header.dim), torch.zeros(n))
        checkpoint.seal()
    samples = TraceStore(work.store).samples
    if samples.sample_ids != ids or samples.metadata != columns:
        raise AssertionError(
            f"written {ids!r} {columns!r}, read {samples.sample_ids!r} {samples.metadata!r}"
        )


def questions(work: Workplace, draw: random.Random) -> None:
    def spec() -> Any:
        if draw.random() < 0.3:
            return draw.choice(TEXTS)
        keys = [draw.choice((*TEXTS, "colour", "shape")) for _ in range(draw.randrange(3))]
        return {key: draw.choice((*TEXTS, *COLOURS, *SHAPES)) for key in keys}

    if draw.random() < 0.5:
        parse_spec(
            [
                draw.choice((*TEXTS, "colour=red", "=", "a=b=c", "=="))
                for _ in range(draw.randrange(4))
            ]
        )
    concept = Concept(draw.choice((*TEXTS, "c")), spec(), spec())
    Attributor(work.sound, work.module, sampler=Sampler(steps=2), record=False).attribute(
        concept
    ).top(2)


def configurations(work: Workplace, draw: random.Random) -> None:
    facts = {
        "seed_everything": 1,
        "model": {"class_path": "tests.stress.subject.Subject"},
        "data": {"class_path": "x"},
    }
    texts = [
        yaml.safe_dump(altered_json(facts, draw), allow_unicode=True),
        "model: !!python/object/apply:os.system ['touch /tmp/ctrak-outside']",
        "model: {class_path: os.system, init_args: {command: touch /tmp/ctrak-outside}}",
        "model: {class_path: subprocess.Popen, init_args: {args: [touch, /tmp/ctrak-outside]}}",
        "a: &a [" + "x," * 9 + "]\nb: &b [" + "*a," * 9 + "]\nc: &c [" + "*b," * 9 + "]\nmodel: *c",
        altered_bytes(yaml.safe_dump(facts).encode(), draw).decode("utf-8", "replace"),
    ]
    path = work.root / "run.yaml"
    path.write_text(draw.choice(texts), encoding="utf-8", errors="replace")
    load_module(path)


KINDS: dict[str, Callable[[Workplace, random.Random], None]] = {
    made.__name__.replace("_", " "): made
    for made in (
        manifest_values,
        manifest_bytes,
        hdf5_bytes,
        hdf5_content,
        weights_bytes,
        ledger_lines,
        sample_ids,
        questions,
        configurations,
    )
}
EXPECTED: dict[str, tuple[type[BaseException], ...]] = {
    # What `ctrak` turns into a message.
    "configurations": (ValueError, TypeError),
}


class Watch:
    """What the process does beside computing, by Python's audit events."""

    EVENTS = (
        "pickle.find_class",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "socket.connect",
    )

    def __init__(self, work: Workplace) -> None:
        self._inside = (str(work.store), str(work.root / "run.yaml"), "/dev/")
        self._root = str(work.root)
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.EVENTS:
            self.seen.append(f"{event} {str(arguments)[:100]}")
        elif (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        ) or event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
            self._written(str(arguments[0]))

    def _written(self, path: str) -> None:
        if not path.startswith(self._inside) and "__pycache__" not in path:
            self.seen.append(f"wrote {path[:100]}")


def case(work: Workplace, kind: str, seed: int) -> tuple[str, str]:
    """The outcome of one case, and what there is to say of it."""
    draw, watch = random.Random(f"{kind}/{seed}"), work.watch
    watch.seen, work.told = [], []
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(12 * SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch.on = True
    try:
        KINDS[kind](work, draw)
        outcome, said = ("told", str(work.told)) if work.told else ("result", "")
    except (*TYPED, *EXPECTED.get(kind, ())) as error:
        outcome, said = "typed error", type(error).__name__
    except Hang:
        outcome, said = "hang", traceback.format_exc()[-800:]
    except AssertionError as error:
        outcome, said = "other answer", str(error)[-3000:]
    except BaseException:
        outcome, said = "other error", traceback.format_exc()[-1500:]
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > BYTES or "MemoryError" in said:
        return "allocation", f"{grown / 1e6:.0f} MB, {outcome} {said}"
    if watch.seen or any(work.outside.iterdir()) or Path("/tmp/ctrak-outside").exists():
        return "outside", f"{watch.seen[:3]}, {outcome}"
    return outcome, said


class Hang(BaseException):
    """A case that takes too long."""


def batch(work: Workplace, cases: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    """Outcomes of cases in a process of their own, which has little memory."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 3 * BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for each in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(each, _hang)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        for kind, seed in cases:
            os.write(write, json.dumps(case(work, kind, seed)).encode() + b"\n")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = [tuple(json.loads(line)) for line in pipe]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if len(found) == len(cases):
        return found
    # The case that it died of, then the others.
    found.append(("crash", f"the process ended with {status}"))
    return found + (batch(work, cases[len(found) :]) if len(found) < len(cases) else [])


def _hang(*_: Any) -> None:
    raise Hang


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def stress(root: Path, cases: int, seed: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Outcomes of so many cases, the kinds in turn."""
    work = Workplace(root)
    every = [(kinds[i % len(kinds)], seed + i) for i in range(cases)]
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    bad, others = [], 0
    for start in range(0, cases, BATCH):
        part = every[start : start + BATCH]
        for (kind, number), (outcome, said) in zip(part, batch(work, part), strict=True):
            outcomes[kind][outcome] += 1
            others += outcome == "told" and "other scores" in said
            if outcome not in ("typed error", "told", "result"):
                told = said.replace(str(ROOT) + os.sep, "")
                bad.append({"kind": kind, "seed": number, "outcome": outcome, "said": told})
                print(kind, number, outcome, said, flush=True)
        if start % 1000 == 0:
            print(start, flush=True)
    total = sum(outcomes.values(), Counter())
    return {
        "cases": cases,
        "seed": seed,
        "outcomes": dict(total),
        "told_with_other_scores": others,
        "by_kind": {kind: dict(found) for kind, found in outcomes.items()},
        "bad": bad,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        keep("inputs", stress(Path(folder), args.cases, args.seed, args.kinds), args.results)


if __name__ == "__main__":
    main()
