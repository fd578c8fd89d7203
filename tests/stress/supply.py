"""What is installed, and what is shipped: the wheel in a bare environment, its demo, and every
installed file against its hash.

python -m tests.stress.supply              # minutes: it runs the demo
python -m tests.stress.supply --no-demo

- The wheel is built twice, and must be the same file; it holds the library, the recipes and
  licences, and nothing else.
- It is installed with nothing but what it and the demo ask for, in an environment of its own;
  imported from an empty folder; every command answers; every recipe is copied, one is trained;
  ``ctrak demo`` runs.
- Every file of every distribution in that environment is what its RECORD says (sha256).
- The versions there are those of .ci/requirements.lock, and none is a known malicious release.
  (Advisories that are published later need the network: run ``pip-audit -r .ci/requirements.lock``
  for them.)
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrak_lightning.cli import COMMANDS
from tests.stress.figures import RESULTS, keep

ROOT = Path(__file__).parent.parent.parent
LOCK = ROOT / ".ci" / "requirements.lock"
MALICIOUS = {"lightning": {"2.6.2", "2.6.3"}, "pytorch-lightning": {"2.6.2", "2.6.3"}}
SHIPPED = re.compile(
    r"ctrak_lightning/(?!recipes/(benchmarks|documentation)/)|ctrak_lightning-[^/]+\.dist-info/"
)
STRANGE = re.compile(r"/(tests|results)/|README")

NAMES = "from ctrak_lightning.cli import recipe; print(*recipe.names())"
RECORDS = """
import base64, hashlib, importlib.metadata as m, json
found = {"distributions": 0, "files": 0, "without_hash": 0, "changed": [], "versions": {}}
for d in m.distributions():
    found["distributions"] += 1
    found["versions"][d.metadata["Name"]] = d.version
    for f in d.files or []:
        if f.hash is None:
            found["without_hash"] += 1
            continue
        digest = hashlib.new(f.hash.mode, f.locate().read_bytes()).digest()
        found["files"] += 1
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != f.hash.value:
            found["changed"].append(str(f))
print(json.dumps(found))
"""


def run(command: Sequence[str | Path], cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def built(folder: Path) -> Path:
    """The wheel of this checkout."""
    run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT],
        folder,
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def locked() -> dict[str, str]:
    """Versions by normalised name."""
    lines = re.findall(r"^(\S+)==(\S+) \\$", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    return {normalised(name): version for name, version in lines}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def shipped(wheel: Path) -> dict[str, Any]:
    names = zipfile.ZipFile(wheel).namelist()
    return {
        "bytes": wheel.stat().st_size,
        "files": len(names),
        "strangers": [name for name in names if not SHIPPED.match(name) or STRANGE.search(name)],
        "licences": sorted(name for name in names if name.endswith(("LICENSE", "NOTICE"))),
    }


def supply(root: Path, demo: bool) -> dict[str, Any]:
    """Figures of the wheel and of a bare environment made of it."""
    for name in ("one", "two", "empty"):
        (root / name).mkdir()
    wheel = built(root / "one")
    found: dict[str, Any] = {"wheel": shipped(wheel)}
    found["wheel"]["built_twice_the_same"] = wheel.read_bytes() == built(root / "two").read_bytes()

    environment, empty = root / "bare", root / "empty"
    run([sys.executable, "-m", "venv", environment], root)
    python, ctrak = environment / "bin" / "python", environment / "bin" / "ctrak"
    # The demo trains an adapter.
    asked = ["--quiet", "--constraint", ROOT / "constraints.txt", f"{wheel}[lora]"]
    run([python, "-m", "pip", "install", *asked], empty)
    run(
        [
            python,
            "-c",
            "import ctrak_lightning, ctrak_lightning.callbacks, ctrak_lightning.metrics",
        ],
        empty,
    )
    found["commands"] = [
        name for name in COMMANDS if "usage: ctrak" in run([ctrak, name, "--help"], empty)
    ]
    for name in run([python, "-c", NAMES], empty).split():
        run([ctrak, "recipe", "copy", name, "copied"], empty)
    config = ["--config", "recipes/emoji_artists/finetune.yaml"]
    config += ["--config", "callbacks/concept_tracer.yaml", "--trainer.max_epochs", "1"]
    run([ctrak, "fit", *config], empty / "copied")
    found["trained"] = (empty / "copied" / "runs" / "traces" / "manifest.json").exists()
    if demo:
        began = time.monotonic()
        said = run([ctrak, "demo", "--out", "demo"], empty)
        found["demo"] = {
            "seconds": round(time.monotonic() - began),
            "pictures": len(list((empty / "demo").rglob("*.png"))),
            "last_line": said.strip().splitlines()[-1],
        }
    records = json.loads(run([python, "-c", RECORDS], empty))
    versions = {normalised(name): version for name, version in records.pop("versions").items()}
    found["records"] = records
    lock = locked() | {"ctrak-lightning": versions["ctrak-lightning"]}
    # pip and setuptools come with the environment.
    found["not_as_locked"] = {
        name: version
        for name, version in versions.items()
        if lock.get(name) != version and name not in ("pip", "setuptools")
    }
    found["malicious"] = [name for name, bad in MALICIOUS.items() if versions.get(name) in bad]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        keep("supply", supply(Path(folder), args.demo), args.results)


if __name__ == "__main__":
    main()
