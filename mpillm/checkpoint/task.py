"""Work in a thread beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Task"]

T = TypeVar("T")


class Task(Generic[T]):
    """Work in a thread that does not keep the process from ending."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._results: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as failure:
            self._failure = failure

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or the other."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for what the work returns; raises what it has raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._results[0]
