"""Threads that stand for processes, so that what several do together is tested fast, and in any
order."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from ctrak_lightning.utilities.processes import Processes

WAIT_S = 60

T = TypeVar("T")


class Thread(Processes):
    """One of ``len(table)`` threads."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.count = rank, len(table)
        self._table, self._barrier = table, barrier

    def gather(self, value: T) -> list[T]:
        self._table[self.rank] = value
        self._barrier.wait()
        found = list(self._table)
        self._barrier.wait()
        return found

    def sum(self, values: Tensor) -> Tensor:
        first, *others = self.gather(values)
        return sum(others, first)


def together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What ``work`` returns in each of ``count`` threads, or the exception that it raises.

    A thread that leaves the others waiting makes this raise: real processes would wait for ever.
    """
    table: list[Any] = [None] * count
    barrier = threading.Barrier(count, timeout=WAIT_S)
    ended: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            ended[rank] = work(Thread(rank, table, barrier))
        except Exception as error:
            ended[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = [error for error in ended if isinstance(error, threading.BrokenBarrierError)]
    if broken:
        raise AssertionError("a thread waited for another that did not come") from broken[0]
    return ended
