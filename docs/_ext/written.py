"""What the site adds to the pages: the sidebar out of the index, the reference out of the package.

The pages stay plain Markdown, so that they read well on a code host. Comments in them say what
stands in their place here:

    <!-- names of ctrak_lightning.callbacks -->    every public name of a package, documented
    <!-- errors -->, <!-- warnings -->             every one that the package defines
"""

import inspect
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import public
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util import logging

logger = logging.getLogger(__name__)

NAMES = re.compile(r"<!-- names of (\S+) -->")
KINDS = re.compile(r"<!-- (errors|warnings) -->")
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
ENTRY = re.compile(r"^- \[[^\]]+\]\(([^)#\s]+)\.md\)", re.MULTILINE)
# What an index of a folder lists: the pages beside it, and the indices of the folders below.
BELOW = re.compile(r"\]\((?!\.\.)((?:[\w-]+/)*README|[\w-]+)\.md\)")
REMOTE = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]+"
)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _kept, priority=100)
    app.connect("autodoc-process-docstring", _as_of_a_method, priority=900)
    app.connect("autodoc-process-docstring", _headed)
    app.connect("missing-reference", _resolved)
    app.connect("doctree-read", _unlinked)
    app.connect("env-check-consistency", _complete)
    app.connect("build-finished", _local)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    text = source[0]
    if docname == app.config.root_doc:
        text += _sidebar(text, docname)
    elif docname.endswith("/README"):
        text += _tree(dict.fromkeys(_page(docname, target) for target in BELOW.findall(text)))
    if NAMES.search(text) or KINDS.search(text):
        # They change with what writes them.
        for path in (__file__, public.__file__):
            app.env.note_dependency(path)
    text = NAMES.sub(lambda match: _rst(_names(match[1])), text)
    source[0] = KINDS.sub(lambda match: _rst(_listed(match[1])), text)


def _sidebar(index: str, docname: str) -> str:
    """A hidden tree of contents for each section of the index, of the pages that it lists."""
    parts = SECTION.split(index)[1:]
    trees = ""
    for caption, body in zip(parts[::2], parts[1::2], strict=True):
        trees += _tree([_page(docname, target) for target in ENTRY.findall(body)], caption)
    return trees


def _tree(pages: Iterable[str], caption: str = "") -> str:
    lines = [":hidden:", *([f":caption: {caption}"] if caption else []), "", *pages]
    return "\n".join(["", "```{toctree}", *lines, "```", ""])


def _page(docname: str, target: str) -> str:
    """A link of the index as a document's absolute name."""
    parts = docname.split("/")[:-1]
    for part in target.split("/"):
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/" + "/".join(parts)


def _rst(lines: Iterable[str]) -> str:
    return "\n".join(["```{eval-rst}", *lines, "```"])


def _names(place: str) -> list[str]:
    """Every public name of a module; those that another page has are led there."""
    module = import_module(place)
    lines = [f".. py:module:: {place}", ""]
    elsewhere = []
    for name in public.names(module):
        value = getattr(module, name)
        home = public.home(value, name)
        if _is_problem(value) or home != place:
            elsewhere.append(f":py:obj:`{name} <{home}.{name}>`")
        else:
            lines += [*_documented(f"{place}.{name}", value), ""]
    if elsewhere:
        lines += [f"Also here: {', '.join(elsewhere)}.", ""]
    return lines


def _is_problem(value: Any) -> bool:
    """Whether docs/errors.md has it."""
    return inspect.isclass(value) and issubclass(value, BaseException)


def _documented(place: str, value: Any) -> list[str]:
    if isinstance(value, ModuleType):
        return [f":py:mod:`{value.__name__}`"]
    if inspect.isclass(value):
        return [
            f".. autoclass:: {place}",
            "   :members:",
            f"   :inherited-members: {FOREIGN}",
        ]
    if inspect.isroutine(value):
        return [f".. autofunction:: {place}"]
    name = place.rpartition(".")[2]  # the module of the page is put before it
    # The docstring of a plain value is its type's; a dict is known by its keys.
    shown = ", ".join(value) if isinstance(value, dict) else str(value)
    return [f".. py:data:: {name}", "", f"   ``{shown}``"]


# What a class has from others' classes is in their documentation.
FOREIGN = "Metric, Callback, Module, ABC, Protocol, tuple, dict, list"


def _listed(kind: str) -> list[str]:
    found = public.problems()[kind]
    lines = [".. list-table::", "   :header-rows: 1", "", f"   * - {kind[:-1]}", "     - when"]
    for one in found:
        lines += [f"   * - :py:exc:`{one.__name__} <{public.place(one)}>`"]
        lines += [f"     - {public.parts(one).when}"]
    for one in found:
        lines += ["", f".. autoexception:: {public.place(one)}", "   :show-inheritance:"]
    return lines


_OWN: dict[str, list[str]] = {}


def _kept(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("property", "attribute", "data"):
        _OWN[name] = list(lines)


def _as_of_a_method(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Of a property, napoleon takes what stands before the first colon for a type."""
    if (own := _OWN.pop(name, None)) is not None:
        lines[:] = GoogleDocstring(own, app.config, app, "method", name, obj, options).lines()


def _headed(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The two headings of an error's docstring, bold."""
    if what == "exception":
        lines[:] = [re.sub(r"^(Why|What to do):", r"**\1.**", line) for line in lines]


def _resolved(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A docstring names a thing by where it is defined, the reference by where it is public."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("ctrak_lightning"):
        return None
    value, owner, attribute = _found(target)
    if value is None:
        logger.warning("%s is named in a docstring, and is not there", target, location=node)
        return None
    if isinstance(owner, ModuleType) or not hasattr(owner, "__qualname__"):
        return None
    name = public.place(owner)
    known = env.get_domain("py").objects
    for place in (name + attribute, name):
        if place in known:
            return _link(app, node, contnode, known[place])
    return None


def _found(target: str) -> tuple[Any, Any, str]:
    """The object, the class or function that is documented for it, and what follows its name."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        owner, attribute = value, ""
        for i, name in enumerate(parts[cut:]):
            value = getattr(value, name, None)
            if value is None:
                return None, None, ""
            owner, attribute = (value, "") if i == 0 else (owner, f"{attribute}.{name}")
        return value, owner, attribute
    return None, None, ""


def _link(app: Sphinx, node: Any, contnode: Any, entry: Any) -> nodes.reference:
    source = node.get("refdoc", app.env.docname)
    uri = app.builder.get_relative_uri(source, entry.docname) + "#" + entry.node_id
    reference = nodes.reference("", "", internal=True, refuri=uri)
    reference += contnode
    return reference


def _unlinked(app: Sphinx, doctree: nodes.document) -> None:
    """Links to a folder, which a site cannot show, as the folder's name."""
    folder = Path(app.srcdir, app.env.docname).parent
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node.get("reftype") == "myst" and (folder / node["reftarget"]).is_dir():
            node.replace_self(node.children)


def _complete(app: Sphinx, env: Any) -> None:
    known = env.get_domain("py").objects
    missing = [
        f"{module.__name__}.{name}"
        for module in public.modules()
        for name in public.names(module)
        if not isinstance(getattr(module, name), ModuleType)
        and f"{public.home(getattr(module, name), name) or module.__name__}.{name}" not in known
    ]
    for name in missing:
        logger.warning("%s is public and not in the reference (docs/reference)", name)


def _local(app: Sphinx, exception: Exception | None) -> None:
    """A page that fetches from another host tells it who reads what, and is broken offline."""
    if exception is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*.html")):
        if found := REMOTE.search(path.read_text(encoding="utf-8")):
            place = path.relative_to(app.outdir)
            raise ExtensionError(f"{place} fetches from another host: {found[0]}")
