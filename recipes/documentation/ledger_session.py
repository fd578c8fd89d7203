"""A run with a ledger, then every command that reads or changes it, as docs/ledger.md shows them:
writes ledger_session.md.

python -m recipes.documentation.ledger_session           # replaces runs/ledger
python -m recipes.documentation.ledger_session --keep    # with the run that is in runs/ledger
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from ctrak_lightning.store import TraceStore

FOLDER = Path("runs/ledger")
STORE = FOLDER / "traces"
PAGE = Path(__file__).with_suffix(".md")
CONFIG = "recipes/emoji_artists/finetune.yaml"
MOST_LINES = 14


def main(keep: bool) -> None:
    if not keep:
        train()
    shutil.rmtree(FOLDER / "copy", ignore_errors=True)
    shutil.copytree(STORE, FOLDER / "copy")
    key, public = str(FOLDER / "key.pem"), str(FOLDER / "public.pem")
    run("openssl", "genpkey", "-algorithm", "ed25519", "-out", key)
    run("openssl", "pkey", "-in", key, "-pubout", "-out", public)
    question = ["--present", "object=christmas-tree", "artist=twemoji"]
    question += ["--absent", "artist=twemoji"]
    sample = TraceStore(STORE).samples.sample_ids[0]
    flip(FOLDER / "copy")
    sections = [
        shown("verify", STORE, "--deep"),
        shown("attribute", STORE, "--config", CONFIG, *question, "--top", "3"),
        shown("sign", STORE, "--key", key),
        shown("forget", STORE, "--sample", sample, "--yes"),
        shown("verify", STORE, "--public-key", public),
        shown("sign", STORE, "--key", key),
        shown("verify", STORE, "--public-key", public),
        shown("verify", FOLDER / "copy"),
        shown("lineage", STORE),
        shown("export", STORE, "--format", "model-card"),
        shown("export", STORE, "--format", "prov", "--out", FOLDER / "prov.json"),
    ]
    command = "python -m recipes.documentation.ledger_session"
    head = f"Written by `{command}`; in `runs/ledger/copy` one bit of a shard was flipped.\n\n"
    PAGE.write_text(head + "\n".join(sections), encoding="utf-8")


def train() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    fit = ["fit", "--config", CONFIG, "--config", str(write_callbacks())]
    fit += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(FOLDER)]
    run(sys.executable, "-m", "ctrak_lightning.cli", *fit, "--trainer.enable_progress_bar", "false")


def write_callbacks() -> Path:
    """The two committed YAML files as one; traces from the training steps, which cost least."""
    names = ("concept_tracer_inline", "provenance_recorder")
    facts = [yaml.safe_load(Path(f"callbacks/{name}.yaml").read_text()) for name in names]
    [tracer], [recorder] = (one["trainer"]["callbacks+"] for one in facts)
    tracer["init_args"] |= {"dirpath": str(STORE), "every_n_epochs": 1, "layers": ["*attn2*"]}
    recorder["init_args"] |= {"base_model": "recipes/emoji_artists/base.safetensors"}
    path = FOLDER / "callbacks.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [tracer, recorder]}}))
    return path


def flip(store: Path) -> None:
    shard = sorted(store.rglob("rank0-*.h5"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def shown(*arguments: object, most: int = MOST_LINES) -> str:
    """A ``ctrak`` command and the first lines that it prints, as a block of Markdown."""
    words = [str(argument) for argument in arguments]
    done = run(sys.executable, "-m", "ctrak_lightning.cli", *words, check=False)
    lines = done.stdout.splitlines()
    rest = [f"... ({len(lines) - most} more lines)"] if len(lines) > most else []
    code = [f"(exit code {done.returncode})"] if done.returncode else []
    text = "\n".join([f"$ ctrak {' '.join(words)}", *lines[:most], *rest, *code])
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{words}: {done.stderr}")
    return f"```\n{text}\n```\n"


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(words, capture_output=True, text=True, check=check, env=environment)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A run with a ledger, and the commands on it.")
    parser.add_argument("--keep", action="store_true", help="use the run that is in runs/ledger")
    main(parser.parse_args().keep)
