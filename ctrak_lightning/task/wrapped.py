"""A task some of whose members are called in another way."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar


class Wrapped:
    """Calls ``members`` of a task by :meth:`call`; whatever else the task has is its own.

    Args:
        task: a DiffusionTask.
    """

    members: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Any) -> None:
        self.wrapped = task

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "wrapped"), name)
        return (
            partial(self.call, name, value) if name in self.members and callable(value) else value
        )

    def call(self, name: str, member: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the member of this name gives."""
        raise NotImplementedError


def unwrapped(task: Any) -> Any:
    """The task itself, where it is wrapped."""
    while isinstance(task, Wrapped):
        task = task.wrapped
    return task


def name_of(task: Any) -> str:
    """The name of a task's own class, for messages."""
    return type(unwrapped(task)).__name__
