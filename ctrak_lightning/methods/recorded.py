"""How the parts of a method stand in a store's manifest, and how they are found again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from ctrak_lightning.errors import MethodError, UnknownMethodError, shorten
from ctrak_lightning.methods.numbers import plain
from ctrak_lightning.utilities.naming import place_of


class Recorded:
    """A part of a method that a store's manifest describes: the class by its place, and its
    arguments. A class of a user's own is a frozen dataclass of numbers and texts."""

    def to_dict(self) -> dict[str, Any]:
        """The class and its arguments, as JSON values."""
        return {"class": place_of(type(self)), **plain(asdict(self))}  # type: ignore[call-overload]

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> "Recorded":
        """The part that has these arguments, JSON values; where a field is no list, JSON's lists
        are tuples, which a frozen dataclass can be hashed with."""
        lists = {
            one.name
            for one in fields(cls)  # type: ignore[arg-type]
            if "list" in str(getattr(one.type, "__name__", one.type)).lower()
        }
        return cls(
            **{
                name: value if name in lists else _as_tuples(value)
                for name, value in arguments.items()
            }
        )


def part_of(base: type[Recorded], facts: Mapping[str, Any]) -> Any:
    """The part that :meth:`Recorded.to_dict` described: of a class that is imported already and is
    a subclass of ``base``. Nothing is imported because a store says so, and nothing else is run.

    Raises:
        UnknownMethodError: there is no such class.
        ValueError: the class has no name.
    """
    arguments = dict(facts)
    place = arguments.pop("class")
    if not (isinstance(place, str) and place):
        raise ValueError(
            f"Method.from_dict: unknown class {shorten(place)}, which is no name of one."
        )
    # By place, since @dataclass(slots=True) and a notebook's cell that is run again leave earlier
    # ones behind.
    imported = {place_of(cls): cls for cls in _subclasses(base)}
    # A script's own classes are elsewhere when another one asks; earlier stores have the name
    # alone.
    module, _, name = place.rpartition(".")
    found = [place] if place in imported else []
    if not found and module in ("", "__main__"):
        found = [one for one in imported if one.rpartition(".")[2] == name]
    if len(found) == 1:
        return imported[found[0]].of_arguments(arguments)
    there = f"there are several: {sorted(found)}" if found else "none is imported"
    raise UnknownMethodError(
        f"The method has {_kind(base)} of the unknown class {shorten(place, 200)}. It is none of the "
        f"library's; expected one from there, and {there}. HINT: import the module that defines "
        "it before, or give the method itself: Attributor(store, module, method=...), or "
        "`--method package.module.name`."
    )


def refuse_unrecorded(method: str, base: type[Recorded], part: Any) -> None:
    """Refuses a part of the method of this name that a store could not describe.

    Raises:
        MethodError: it is no ``base``, no dataclass, has an argument that JSON has not, or is
            another one when it is read back.
    """
    problem = None
    if not isinstance(part, base):
        problem = f"it is no {base.__name__}: expected a subclass of {base.__module__}."
        problem += f"{base.__name__}, and an instance rather than the class"
    elif type(part).to_dict is Recorded.to_dict and not _has_fields_alone(type(part)):
        problem = f"{type(part).__name__} is no dataclass: expected @dataclass(frozen=True)"
    else:
        try:
            facts = json.loads(json.dumps(part.to_dict(), allow_nan=False))
        except (TypeError, ValueError) as error:
            problem = f"{error}: expected numbers and texts as arguments"
        else:
            problem = _changed(base, part, facts)
    if problem:
        raise MethodError(
            f"Method({method!r}): a store cannot describe {shorten(part, 120)} as {_kind(base)}, "
            f"for {problem}. HINT: a class of your own is a @dataclass(frozen=True) in a module, "
            "and its fields are numbers, texts, booleans or None; make tensors from those where "
            "they are needed."
        )


def _has_fields_alone(kind: type) -> bool:
    """Whether a dataclass made the initialiser: a subclass with one of its own has what is in no
    field."""
    maker = next(one for one in kind.__mro__ if "__init__" in vars(one))
    return is_dataclass(kind) and "__dataclass_fields__" in vars(maker)


def _changed(base: type[Recorded], part: Any, facts: dict[str, Any]) -> str | None:
    try:
        again = part_of(base, facts)
    except (TypeError, ValueError, AttributeError) as error:
        return f"it cannot be read back ({error})"
    # By what is recorded, where that is all there is: a list may be a tuple, a number numpy's.
    if type(part).to_dict is Recorded.to_dict:
        is_same = json.loads(json.dumps(again.to_dict())) == facts
    else:
        is_same = again == part
    return None if is_same else f"read back it would be {shorten(again, 120)}"


def _as_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_as_tuples, value))
    return value


def _kind(base: type) -> str:
    words = "".join(f" {c.lower()}" if c.isupper() else c for c in base.__name__).strip()
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _subclasses(base: type) -> Iterator[Any]:
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield cls
        yield from _subclasses(cls)
