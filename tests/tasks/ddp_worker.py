"""One fine-tune of a tiny pipeline on two processes: ``python -m tests.tasks.ddp_worker FOLDER
PIPELINE plain|traced``."""

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.tasks.runs import made, tracer, train


def main(folder: str, name: str, what: str) -> None:
    module = made(name)
    callbacks = [tracer(f"{folder}/traces")] if what == "traced" else []
    trainer = train(module, callbacks, strategy="ddp", devices=2)
    if trainer.is_global_zero:
        Path(folder).mkdir(exist_ok=True)
        save_file(
            {n: p.detach().clone() for n, p in module.named_parameters()},
            f"{folder}/weights.safetensors",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
