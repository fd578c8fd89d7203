"""Mutation testing: the code with one small fault at a time, and whether its tests notice.

python -m tests.stress.mutants --per-file 40

Of every file the mutants are drawn at random (comparisons, arithmetic, constants, conditions, and /
or, dropped calls); each is run in a copy of the checkout against the tests that are named for the
file. A survivor is a fault that no test noticed: some change nothing that can be seen (a bound that
is never met), the others want a test.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.stress.figures import RESULTS, keep

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 600

_WRITING = [
    f"tests/store/test_store_{name}.py"
    for name in ("writer", "roundtrip", "crash", "background", "processes", "int8")
]
TARGETS: dict[str, list[str]] = {
    "ctrak_lightning/methods/objectives.py": ["tests/methods/test_objective.py", "tests/methods/test_method.py", "tests/gradients/test_modes.py"],
    "ctrak_lightning/attribution/scoring.py": ["tests/attribution/test_solve.py", "tests/attribution/test_numbers.py", "tests/attribution/test_result.py", "tests/attribution/test_top.py"],
    "ctrak_lightning/store/kernel.py": ["tests/attribution/test_solve.py", "tests/attribution/test_top.py", "tests/store/test_store_roundtrip.py", "tests/store/test_store_damage.py"],
    "ctrak_lightning/store/writer.py": _WRITING,
    "ctrak_lightning/store/checkpoint_writer.py": _WRITING,
    "ctrak_lightning/store/background.py": _WRITING,
    "ctrak_lightning/gradients/kinds/convolution.py": ["tests/gradients"],
    "ctrak_lightning/gradients/kinds/linear.py": ["tests/gradients"],
    "ctrak_lightning/gradients/kinds/norm.py": ["tests/gradients"],
    "ctrak_lightning/schedules.py": ["tests/test_parameterization.py"],
}  # fmt: skip

_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Sub,
}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what was done, and the mutated source, for every place where something can be done."""
    tree = ast.parse(source)
    # `frozen` and `slots` of a dataclass are no behaviour of ours.
    decorators = [each for node in ast.walk(tree) for each in getattr(node, "decorator_list", [])]
    beside = {id(part) for each in decorators for part in ast.walk(each)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in beside:
            continue
        for done in _ways(node):
            changed = copy.deepcopy(tree)
            target = next(each for i, each in enumerate(ast.walk(changed)) if i == number)
            _apply(target, done)
            yield (
                getattr(node, "lineno", 0),
                f"{done}: {ast.unparse(node)[:90]}",
                ast.unparse(changed),
            )


def _ways(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        return ["compare"]
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _ARITHMETIC:
        return ["arithmetic"]
    if isinstance(node, ast.BoolOp):
        return ["and/or"]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        return ["constant"]
    if isinstance(node, (ast.If, ast.IfExp)):
        return ["condition"]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ["dropped call"]
    return []


def _apply(node: Any, done: str) -> None:
    if done == "compare":
        node.ops[0] = _COMPARE[type(node.ops[0])]()
    elif done == "arithmetic":
        node.op = _ARITHMETIC[type(node.op)]()
    elif done == "and/or":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif done == "constant":
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1
    elif done == "condition":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        node.value = ast.Constant(None)


def notices(copied: Path, tests: Sequence[str]) -> bool:
    """Whether the tests fail."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *tests,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(copied),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=copied, env=environment, capture_output=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def stress(per_file: int, seed: int, files: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        copied = Path(place) / "checkout"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "demo", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, copied, ignore=ignored)
        for name in files:
            source = (ROOT / name).read_text(encoding="utf-8")
            if notices(copied, TARGETS[name]):
                raise SystemExit(f"The tests of {name} fail without a mutant: {TARGETS[name]}.")
            every = list(mutants(source))
            drawn = random.Random(seed).sample(every, min(per_file, len(every)))
            survivors = []
            for line, what, mutated in drawn:
                (copied / name).write_text(mutated, encoding="utf-8")
                if not notices(copied, TARGETS[name]):
                    survivors.append(f"line {line}, {what}")
                    print(name, survivors[-1], flush=True)
            (copied / name).write_text(source, encoding="utf-8")
            found[name] = {
                "of": len(every),
                "tried": len(drawn),
                "killed": len(drawn) - len(survivors),
                "survivors": survivors,
            }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--per-file", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    keep("mutants", stress(args.per_file, args.seed, args.files), args.results)


if __name__ == "__main__":
    main()
