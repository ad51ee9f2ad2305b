"""A lock on a run folder, so that two jobs never work on one run at the same time.

`RUN/lock` holds one line of JSON that names the holder, under an OS lock (`flock`). The OS lock
dies with its process, even by kill -9, and unlike a POSIX record lock it does not vanish when the
process closes another descriptor of the file. Some parallel file systems keep it to one node, or
have none. So the record also has a beat: a count that the holder raises every two seconds. Whoever
finds a record judges it by its process:

- one of this machine, by whether it is alive;
- one of another machine, by whether its beat changes within twenty seconds.

Where the OS lock cannot decide between two jobs that both judge a record dead, each writes its own
and looks a second later whose stands (Fischer's algorithm). A holder that finds another's record in
the place of its own ends its job: no two jobs go on together.

The file is never removed: a lock on a file that is gone would keep nobody out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from mpillm.errors import EXIT_USER_ERROR, UserError
from mpillm.parallel.launch import abort
from mpillm.training.lock_record import Record, State, Watch, decode, is_local

__all__ = ["RunLock"]

_SIZE = 1024  # bytes of a record, so that a beat writes in place
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_GRACE = 1.0  # seconds for a holder that was killed a moment ago to be gone
_POLL = 0.05  # seconds between looks at a lock that another has


class RunLock:
    """Keeps other jobs away from a run folder, from `acquire` to `release` or the process's end.

    For one rank of a job, until no rank writes into the folder any more. `beat`: seconds between
    beats; `patience`: seconds without one after which a job of another machine counts as ended;
    `lost`: called, in a thread, when another job has taken the folder over; by default it ends the
    job.
    """

    def __init__(
        self,
        folder: Path,
        *,
        beat: float = 2.0,
        patience: float = 20.0,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        self._folder = folder
        self._path = folder / "lock"
        self._interval = beat
        self._patience = patience
        self._settle = beat / 2
        self._lost = lost or _end_job
        self._handle = -1
        self._record = Record.own()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock of the folder, which is there.

        Raises UserError, and has changed nothing, where another job holds it.
        """
        watch = Watch(self._patience)
        begin = time.monotonic()
        while (state := self._attempt(watch)) is not None:
            limit = _GRACE if state is State.ALIVE else 2 * self._patience
            if time.monotonic() - begin > limit:
                holder = watch.record or "another job, which is about to start"
                raise UserError(
                    f"run.dir = {str(self._folder)!r} is in use by {holder}; wait for its end, end "
                    "it, or choose another run.dir"
                )
            time.sleep(_POLL)
        self._released.clear()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others have the folder; without effect where this process does not hold it."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError):  # a record that stays is one of a process that ends
            if self._is_mine(os.pread(self._handle, _SIZE, 0)):
                os.ftruncate(self._handle, 0)
                os.fsync(self._handle)
        os.close(self._handle)  # and with it goes the OS lock

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _attempt(self, watch: Watch) -> State | None:
        """`_try`, with what the file system says as a UserError."""
        try:
            return self._try(watch)
        except OSError as error:
            raise UserError(
                f"run.dir = {str(self._folder)!r}: its file {self._path.name!r} cannot be used: "
                f"{error.strerror}; it is made by mpillm, and may be removed when no job runs here"
            ) from None

    def _try(self, watch: Watch) -> State | None:
        """Take the lock if nobody has it: None then; else what is known of who has it."""
        try:
            handle = _open(self._path)
        except FileNotFoundError:  # another job is moving the folder out of its way
            return State.UNKNOWN
        try:
            locked = _os_lock(handle)
            raw = os.pread(handle, _SIZE, 0)
            state = watch.judge(raw)
            if locked is False or state is not State.FREE or not _same_file(handle, self._path):
                return State.ALIVE if state is State.ALIVE else State.UNKNOWN
            _write(handle, self._record)
            # The OS lock decides between jobs of this machine, and there are no others, as far as
            # is known, when the last one ended in order or was of this machine.
            if not locked or (raw.strip() and not is_local(watch.record)):
                time.sleep(self._settle)
                if not self._is_mine(_read(self._path)):
                    return State.UNKNOWN
            self._handle, handle = handle, -1
            return None
        finally:
            if handle >= 0:
                os.close(handle)

    def _is_mine(self, raw: bytes) -> bool:
        """Whether these bytes are this lock's record."""
        found = decode(raw)
        return found is not None and found.token == self._record.token

    def _beat(self) -> None:
        """Raise the count until the lock is released or another job has taken it."""
        record = self._record
        while not self._released.wait(self._interval):
            record = msgspec.structs.replace(record, beat=record.beat + 1)
            try:
                found = decode(_read(self._path))
                if found is None or found.token == record.token:
                    _write(self._handle, record)
                    continue
            except OSError:
                continue  # a disk that stumbles or is full; the next beat may come through
            self._lost(f"run.dir = {str(self._folder)!r} was taken over by {found}")
            return


def _end_job(message: str) -> None:
    """End all ranks: another job writes into the folder."""
    with contextlib.suppress(OSError):  # where the launcher is gone, nobody reads it
        sys.stderr.write(f"mpillm: error: {message}\n")
        sys.stderr.flush()
    time.sleep(0.2)  # for the launcher to pass the line on
    abort(EXIT_USER_ERROR)


# --- the file -------------------------------------------------------------------------------------


def _open(path: Path) -> int:
    """A descriptor of the lock's file, made where there is none; OSError for other than a file."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return handle


def _os_lock(handle: int) -> bool | None:
    """Take the OS lock: whether it was to be had; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _write(handle: int, record: Record) -> None:
    """Put a record in the place of the one before, in one piece."""
    line = msgspec.json.encode(record)
    os.pwrite(handle, line.ljust(_SIZE - 1) + b"\n", 0)
    os.fsync(handle)  # for other machines


def _same_file(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> bytes:
    """The record's bytes as other machines have left them: only a file just opened shows them."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(handle, _SIZE)
    finally:
        os.close(handle)
