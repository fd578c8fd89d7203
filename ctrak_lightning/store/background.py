"""Jobs in a thread that lives only while there are some: shards are written while the next rows are
computed."""

import threading
from collections import deque
from collections.abc import Callable

from ctrak_lightning.errors import StoreError

_LOOK_S = 1.0


class InBackground:
    """Runs jobs one after the other in a thread that lives only while there are some.

    A job that fails stays first in the queue and stops it; its error is raised by the next
    :meth:`raise_error` or :meth:`wait`, in the caller's thread, and the job is tried again with the
    next :meth:`submit` or :meth:`wait`.

    Args:
        limit: jobs that may wait, the one being done included; one more waits for room.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._working = False
        self._error: BaseException | None = None
        self._failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Queue ``job``; waits while the queue is full, and never raises what went wrong with an
        earlier job."""
        with self._changed:
            self._jobs.append(job)
            self._start()
            while len(self._jobs) > self._limit and not self._stopped():
                self._changed.wait(_LOOK_S)

    def raise_error(self) -> None:
        """Raise what a job ended with since the last call.

        Raises:
            StoreError: The job's own, or one that names what it raised.
        """
        with self._changed:
            self._stopped()
            error, self._error = self._error, None
        if isinstance(error, StoreError):
            raise error
        if error is not None:
            raise StoreError(
                f"The thread that writes traces ended with {type(error).__name__}: {error}. HINT: "
                "everything recorded earlier is intact; try again to continue."
            ) from error

    def wait(self) -> None:
        """Wait until all jobs are done and the thread has ended.

        Raises:
            StoreError: As :meth:`raise_error`; the jobs from the one that failed on are still
                queued.
        """
        with self._changed:
            if self._error is None:
                self._start()
            while self._jobs and not self._stopped():
                self._changed.wait(_LOOK_S)
            thread = self._thread
        if thread is not None:
            thread.join()
        self.raise_error()

    def end(self) -> None:
        """:meth:`wait`, unless the last attempt failed; then drop what is left.

        Raises:
            StoreError: As :meth:`raise_error`, of a job that has failed since.
        """
        try:
            if self._failed:
                self.raise_error()
            else:
                self.wait()
        finally:
            with self._changed:
                self._jobs.clear()

    def _start(self) -> None:
        """Start the thread if there is work and none is at it; the lock is held."""
        if not self._jobs or self._error is not None or self._working:
            return
        # Not a daemon: a process that ends while a shard is being written finishes it.
        self._thread = threading.Thread(target=self._run, name="ctrak-write")
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread, self._error, self._failed = None, error, True
            return
        self._working = True

    def _stopped(self) -> bool:
        """Whether nobody works on the queue any more; a thread that died without a word is noticed
        here. The lock is held."""
        if self._working and self._thread is not None and not self._thread.is_alive():
            self._working = False
            self._error, self._failed = RuntimeError("it died with jobs left to do"), True
        return self._error is not None

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._working = False
                    return
                job = self._jobs[0]
            try:
                job()
            except BaseException as error:
                with self._changed:
                    self._working = False
                    self._error, self._failed = error, True
                    self._changed.notify_all()
                return
            with self._changed:
                self._failed = False
                self._jobs.popleft()
                self._changed.notify_all()
