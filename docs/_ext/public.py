"""What of the package is public: every name in the ``__all__`` of a module, and every error."""

import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import ctrak_lightning

# Also public without an `__all__`. The first of them that has a name documents it.
FIRST = [
    "ctrak_lightning",
    "ctrak_lightning.callbacks",
    "ctrak_lightning.methods",
    "ctrak_lightning.methods.objectives",
    "ctrak_lightning.methods.trajectories",
    "ctrak_lightning.metrics.functional",
    "ctrak_lightning.attribution.baselines",
]


@dataclass(frozen=True)
class Parts:
    """The paragraphs of an error's docstring."""

    when: str
    why: str
    to_do: str


@cache
def everything() -> list[ModuleType]:
    """The package and all its modules, but for what runs when it is imported."""
    found = pkgutil.walk_packages(ctrak_lightning.__path__, "ctrak_lightning.")
    skipped = re.compile(r"__main__$|\.recipes\b")
    wanted = [one.name for one in found if not skipped.search(one.name)]
    return [ctrak_lightning, *map(import_module, wanted)]


@cache
def modules() -> list[ModuleType]:
    """Those that say what is public of them, and the presets."""
    found = [one for one in everything() if hasattr(one, "__all__") or one.__name__ in FIRST]
    places = {name: i for i, name in enumerate(FIRST)}
    return sorted(found, key=lambda one: (places.get(one.__name__, len(places)), one.__name__))


def names(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        # Classes, then functions, then constants.
        return sorted(listed, key=lambda name: (name.isupper(), name[0].islower(), name.lower()))
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]


def home(value: Any, name: str) -> str | None:
    """The module whose page documents this object, if one does."""
    for module in modules():
        if name in names(module) and getattr(module, name) is value:
            return module.__name__
    return None


def place(value: Any) -> str:
    """The name by which a class or a function is imported: its public one, if it has one."""
    return f"{home(value, value.__name__) or value.__module__}.{value.__qualname__}"


@cache
def problems() -> dict[str, list[type[BaseException]]]:
    """Every error and every warning that the package defines, by name."""
    found = {
        value
        for module in everything()
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, BaseException)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    }
    ordered = sorted(found, key=lambda one: one.__name__)
    return {
        "errors": [one for one in ordered if not issubclass(one, Warning)],
        "warnings": [one for one in ordered if issubclass(one, Warning)],
    }


def parts(one: type[BaseException]) -> Parts:
    """A docstring of three paragraphs: when; ``Why: ...``; ``What to do: ...``."""
    paragraphs = [" ".join(text.split()) for text in (inspect.getdoc(one) or "").split("\n\n")]
    found = {"Why:": "", "What to do:": ""}
    for paragraph in paragraphs[1:]:
        for head in found:
            if paragraph.startswith(head):
                found[head] = paragraph.removeprefix(head).strip()
    return Parts(paragraphs[0], found["Why:"], found["What to do:"])
