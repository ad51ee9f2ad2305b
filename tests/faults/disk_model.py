"""A file system that forgets what was not fsynced.

Files and folders have a durable state and changes that are not durable yet. What a power cut leaves
is any choice of the latter: of a file, any of its writes, in part, or as zeros of their length; of
a folder, any of its entries' changes, where one rename is one change. An fsync makes the changes of
that one file or folder durable, and nothing else: not the entry that leads to it. Real file systems
keep more order than this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from random import Random
from typing import TypeVar

from disk_calls import Call

__all__ = ["Disk", "Tree", "write_tree"]

T = TypeVar("T")
Choose = Callable[[list[T]], list[T]]
Tree = dict[str, "bytes | Tree"]
"""Contents of a folder: bytes of files, trees of folders."""


@dataclass(eq=False)
class File:
    """A file: what is durable, and the writes after that, as offset and bytes."""

    durable: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)

    def left(self, random: Random | None, share: float) -> bytes:
        """The bytes that a power cut leaves; all of them without `random`."""
        content = bytearray(self.durable)
        for offset, data in self.writes:
            if random is not None and random.random() >= share:
                how = random.choice(("lost", "zeros", "torn"))
                data = {
                    "zeros": bytes(len(data)),
                    "torn": data[: random.randint(0, len(data))],
                }.get(how, b"")
            if data:
                content.extend(bytes(max(offset + len(data) - len(content), 0)))
                content[offset : offset + len(data)] = data
        return bytes(content)


@dataclass(eq=False)
class Folder:
    """A folder: what is durable, and the changes after that.

    A change is (entry that goes, entry that comes, to what); a rename has both.
    """

    durable: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[tuple[str | None, str | None, File | Folder]] = field(default_factory=list)

    def entries(
        self, chosen: list[tuple[str | None, str | None, File | Folder]] | None = None
    ) -> dict[str, File | Folder]:
        """The entries after all changes, or after chosen ones.

        Raises Lost when a complete checkpoint would be in the way of a rename that was kept.
        """
        entries = dict(self.durable)
        for goes, comes, inode in self.changes if chosen is None else chosen:
            if goes is not None and entries.get(goes) is inode:
                del entries[goes]
            if comes is not None:
                if goes is not None and comes.startswith("step-") and comes in entries:
                    raise Lost(f"{goes} was renamed to {comes} while that was there")
                entries[comes] = inode
        return entries


class Lost(Exception):
    """What a file system that keeps no order cannot make sense of."""


class Disk:
    """The state of a folder after a log of calls, played one after another."""

    def __init__(self, root: Path) -> None:
        self._root_path = root
        self.root = Folder()
        self._handles: dict[int, File | Folder] = {}

    def play(self, call: Call) -> None:
        """What a call does to the state."""
        if call.name == "note":
            return
        if call.name == "write":
            self._handles[call.handle].writes.append((call.offset, call.data))
        elif call.name == "fsync":
            inode = self._handles[call.handle]
            if isinstance(inode, File):
                inode.durable, inode.writes = inode.left(None, 1), []
            else:
                inode.durable, inode.changes = inode.entries(), []
        elif call.name == "open":
            self._handles[call.handle] = self._find(call.path)
        elif call.name == "close":
            del self._handles[call.handle]
        else:
            self._change(call)

    def _change(self, call: Call) -> None:
        """A change of a folder's entries."""
        path = PurePath(call.path)
        folder, name = self._find(str(path.parent)), path.name
        assert isinstance(folder, Folder)
        entries = folder.entries()
        if call.name == "create":
            self._handles[call.handle] = inode = File()
            change: tuple[str | None, str | None, File | Folder] = (None, name, inode)
        elif call.name == "mkdir":
            change = (None, name, Folder())
        elif call.name == "rename":
            target = PurePath(call.target)
            assert target.parent == path.parent, "a rename into another folder"
            change = (name, target.name, entries[name])
        else:
            assert call.name in ("unlink", "rmdir"), call
            inode = entries[name]
            assert isinstance(inode, File) or not inode.entries(), f"{path} is not empty"
            change = (name, None, inode)
        assert change[1] is None or change[1] not in entries, call
        folder.changes.append(change)

    def _find(self, path: str) -> File | Folder:
        inode: File | Folder = self.root
        for name in PurePath(path).relative_to(self._root_path).parts:
            assert isinstance(inode, Folder)
            inode = inode.entries()[name]
        return inode

    def now(self) -> Tree:
        """What is seen while the machine runs."""
        return _tree(self.root, None, 1)

    def cut(self, random: Random, share: float) -> Tree:
        """What a power cut leaves, when this share of the changes that are not durable is kept.

        0: nothing but what is durable. 1: everything. Between them: each change is kept or not by
        chance, or, of a folder and as often, the first ones.
        """
        return _tree(self.root, random, share)


def _tree(folder: Folder, random: Random | None, share: float) -> Tree:
    chosen = None
    if random is not None:
        if random.random() < 0.5:
            chosen = [change for change in folder.changes if random.random() < share]
        else:
            most = len(folder.changes)
            kept = random.randint(0, most) if 0 < share < 1 else round(share * most)
            chosen = folder.changes[:kept]
    return {
        name: _tree(inode, random, share)
        if isinstance(inode, Folder)
        else inode.left(random, share)
        for name, inode in folder.entries(chosen).items()
    }


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a folder with these contents."""
    folder.mkdir(parents=True)
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_tree(content, folder / name)


def read_tree(folder: Path) -> Tree:
    """The contents of a folder."""
    return {
        path.name: read_tree(path) if path.is_dir() else path.read_bytes()
        for path in folder.iterdir()
    }


def folders(tree: Tree, *names: str) -> Iterator[tuple[str, Tree]]:
    """The folders in a folder of a tree, which may not be there."""
    for name in names:
        inner = tree.get(name, {})
        if isinstance(inner, bytes):
            return
        tree = inner
    for name, content in tree.items():
        if not isinstance(content, bytes):
            yield name, content
