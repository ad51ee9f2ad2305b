"""Every call of the system that changes what lies in a folder: seen, noted, made to fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

__all__ = ["Call", "DiskCalls"]


@dataclass(frozen=True)
class Call:
    """A call: of what, on which path. Files and folders that are open are told apart by `handle`.

    name: create, open, write, fsync, close, rename, mkdir, unlink, rmdir, or "note".
    """

    name: str
    path: str
    handle: int = 0
    offset: int = 0
    data: bytes = b""
    target: str = ""


class DiskCalls:
    """Sees the calls of `os` that touch a folder, by all threads, while it is entered.

    before: called with each before it is made; may raise what the call is then to raise.
    """

    def __init__(self, folder: Path, before: Callable[[Call], None] = lambda call: None) -> None:
        self.log: list[Call] = []
        self._root = str(folder)
        self._before = before
        self._lock = threading.RLock()
        self._open: dict[int, tuple[str, int]] = {}  # by descriptor: path, number of the handle
        self._count = 0
        self._plain = {name: getattr(os, name) for name in _WATCHED}
        self._patches = [
            mock.patch.object(os, name, getattr(self, f"_call_{name}", None) or self._refused(name))
            for name in _WATCHED
        ]

    def __enter__(self) -> DiskCalls:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for patch in self._patches:
            patch.stop()

    def note(self, what: str) -> None:
        """Put a remark between the calls."""
        with self._lock:
            self.log.append(Call("note", what))

    def _path(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The whole path, where it is below the folder."""
        text = os.fspath(path)
        if dir_fd is not None:
            if dir_fd not in self._open:
                return None
            text = os.path.join(self._open[dir_fd][0], text)
        text = os.path.abspath(text)
        return text if text == self._root or text.startswith(self._root + os.sep) else None

    def _do(self, call: Call, make: Callable[[], Any]) -> Any:
        with self._lock:
            self._before(call)
            result = make()
            self.log.append(call)
            return result

    def _call_open(
        self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        whole = self._path(path, dir_fd)
        plain = self._plain["open"]
        if whole is None:
            return int(plain(path, flags, mode, dir_fd=dir_fd))
        with self._lock:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            assert not writes or flags & os.O_EXCL, f"{whole} is opened for writing and not made"
            self._count += 1
            call = Call("create" if writes else "open", whole, self._count)
            descriptor = int(self._do(call, lambda: plain(path, flags, mode, dir_fd=dir_fd)))
            self._open[descriptor] = whole, self._count
            return descriptor

    def _call_close(self, descriptor: int) -> None:
        with self._lock:
            path, handle = self._open.pop(descriptor, ("", 0))
            self._plain["close"](descriptor)
            if handle:
                self.log.append(Call("close", path, handle))

    def _call_pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if descriptor not in self._open:
            return int(self._plain["pwrite"](descriptor, data, offset))
        path, handle = self._open[descriptor]
        call = Call("write", path, handle, offset, bytes(data))
        done = int(self._do(call, lambda: self._plain["pwrite"](descriptor, data, offset)))
        assert done == len(call.data)
        return done

    def _call_write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self._open:
            return int(self._plain["write"](descriptor, data))
        path, handle = self._open[descriptor]
        call = Call("write", path, handle, os.lseek(descriptor, 0, os.SEEK_CUR), bytes(data))
        done = int(self._do(call, lambda: self._plain["write"](descriptor, data)))
        assert done == len(call.data)
        return done

    def _call_fsync(self, descriptor: int) -> None:
        if descriptor not in self._open:
            return self._plain["fsync"](descriptor)
        path, handle = self._open[descriptor]
        return self._do(Call("fsync", path, handle), lambda: self._plain["fsync"](descriptor))

    def _call_rename(self, source: Any, target: Any, **options: Any) -> None:
        old, new = self._path(source), self._path(target)
        plain = self._plain["rename"]
        if old is None or new is None:
            assert old is new, "a rename across the edge of the folder"
            return plain(source, target, **options)
        return self._do(Call("rename", old, target=new), lambda: plain(source, target, **options))

    def _by_path(self, name: str, path: Any, dir_fd: int | None, *rest: Any) -> None:
        whole = self._path(path, dir_fd)
        plain = self._plain[name]
        if whole is None:
            return plain(path, *rest, dir_fd=dir_fd)
        return self._do(Call(name, whole), lambda: plain(path, *rest, dir_fd=dir_fd))

    def _call_mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._by_path("mkdir", path, dir_fd, mode)

    def _call_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._by_path("unlink", path, dir_fd)

    def _call_rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._by_path("rmdir", path, dir_fd)

    def _refused(self, name: str) -> Callable[..., Any]:
        """A call that saving does not make; should it ever, it must be taught here first."""

        def call(*arguments: Any, **options: Any) -> Any:
            first = arguments[0]
            inside = first in self._open if isinstance(first, int) else self._path(first)
            assert not inside, f"os.{name} is not watched"
            return self._plain[name](*arguments, **options)

        return call


_WATCHED = (
    *("open", "close", "pwrite", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"),
    *("replace", "remove", "truncate", "ftruncate", "link", "symlink", "writev", "pwritev"),
    *("sendfile", "copy_file_range", "posix_fallocate", "fdatasync"),
)
