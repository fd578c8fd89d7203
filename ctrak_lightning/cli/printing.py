"""What the commands print."""

from ctrak_lightning.escaping import visible


def say(*lines: object) -> None:
    """Prints each of ``lines`` as one line; whatever in it could act on the terminal, or look like
    a line of ours, is escaped."""
    for line in lines:
        print(visible(line))
