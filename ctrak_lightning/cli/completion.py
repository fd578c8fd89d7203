"""``ctrak completion``: a script that completes these commands in a shell."""

from importlib.util import find_spec

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ctrak_lightning.cli import COMMANDS, command_line


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "Prints a script that completes the commands and their options. In bash: ctrak "
            "completion bash > ~/.local/share/bash-completion/completions/ctrak"
        )
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="of which shell")
    return parser


def run(args: Namespace) -> None:
    if find_spec("shtab") is None:
        raise ValueError(
            "the package shtab, which writes such scripts, is not installed. HINT: pip install "
            "'ctrak-lightning[completion]'."
        )
    set_parsing_settings(add_print_completion_argument=True)
    try:
        command_line(*COMMANDS).parse_args([f"--print_completion=shtab-{args.shell}"])
    finally:
        set_parsing_settings(add_print_completion_argument=False)
