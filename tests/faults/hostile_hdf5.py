"""Attacks on an HDF5 file that libhdf5 itself makes: what is there becomes something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from mpillm.storage.hdf5 import FORMAT

__all__ = ["ATTACKS", "attack"]


def attack(rng: Random, path: Path, name: str) -> None:
    """Make a dataset of a whole file into something else, by one of `ATTACKS`."""
    with h5py.File(path, "r+", libver=rng.choice((FORMAT, "earliest", "latest"))) as file:
        rng.choice(ATTACKS)(file, name)


def _replace(file: h5py.File, name: str, **options: Any) -> None:
    """Put a dataset of other options in the place of one; by default of its type and shape."""
    old = file[name]
    options = {"dtype": old.dtype, "shape": old.shape, **options}
    del file[name]
    file.create_dataset(name, **options)


def _of(**options: Any) -> Callable[[h5py.File, str], None]:
    return lambda file, name: _replace(file, name, **options)


def _link(kind: Callable[[str], Any]) -> Callable[[h5py.File, str], None]:
    def change(file: h5py.File, name: str) -> None:
        file["elsewhere"] = file[name]
        del file[name]
        file[name] = kind(name)

    return change


def _external_storage(file: h5py.File, name: str) -> None:
    other = Path(file.filename).with_name("raw")
    other.write_bytes(bytes(2**16))
    _replace(file, name, external=[(str(other), 0, 2**16)])


def _virtual(file: h5py.File, name: str) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    layout = h5py.VirtualLayout(shape or (1,), dtype)
    layout[...] = h5py.VirtualSource("other.h5", "x", shape or (1,))
    file.create_virtual_dataset(name, layout)


def _compact(file: h5py.File, name: str) -> None:
    data = file[name][()]
    del file[name]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.COMPACT)
    parent, _, last = name.rpartition("/")
    space = h5py.h5s.create_simple(data.shape) if data.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    kind = h5py.h5t.py_create(data.dtype)
    h5py.h5d.create(file[parent or "/"].id, last.encode(), kind, space, dcpl=settings)


def _committed_type(file: h5py.File, name: str) -> None:
    file["type"] = file[name].dtype
    _replace(file, name, dtype=file["type"])


def _circle(file: h5py.File, name: str) -> None:
    del file[name]
    file[name] = file["/"]


def _deep(file: h5py.File, name: str) -> None:
    del file[name]
    group = file
    for _ in range(300):
        group = group.create_group("g")
    file[name] = group


def _null(file: h5py.File, name: str) -> None:
    dtype = file[name].dtype
    del file[name]
    file[name] = h5py.Empty(dtype)


def _attributes(*values: Any) -> Callable[[h5py.File, str], None]:
    def change(file: h5py.File, name: str) -> None:
        for item in (file, file[name]):
            for number, value in enumerate(values):
                item.attrs[f"more{number}"] = value
                if "version" in item.attrs:
                    item.attrs["version"] = value

    return change


def _names(*names: str) -> Callable[[h5py.File, str], None]:
    def change(file: h5py.File, name: str) -> None:
        for other in names:
            file[name.rpartition("/")[0] + "/" + other] = file[name]

    return change


def _old_files(file: h5py.File, name: str) -> None:
    """Data of many types, each made in the structures of the version that the file is open with."""
    for number in range(20):
        file.create_dataset(f"old{number}", data=np.arange(9 + number), chunks=(5,))


VOID = np.dtype([("a", "<f4"), ("b", "<i8", (3,))])
ATTACKS: tuple[Callable[[h5py.File, str], None], ...] = (
    _link(lambda name: h5py.SoftLink("/elsewhere")),
    _link(lambda name: h5py.SoftLink(f"/{name}")),
    _link(lambda name: h5py.ExternalLink("other.h5", "/x")),
    _link(lambda name: h5py.ExternalLink("export.h5", f"/{name}")),
    _external_storage,
    _virtual,
    _compact,
    _committed_type,
    _circle,
    _deep,
    _null,
    _attributes("variable length"),
    _attributes(np.arange(10)),
    _attributes(*range(30)),
    _attributes(np.bytes_(b"x" * 60_000), np.bytes_(b"x" * 60_000), float("nan"), -1, 2**63),
    _attributes(np.bytes_(b"\xff\xfe"), np.bytes_(b"a\nb")),
    _names("a\nb", "\u2028", "x" * 3000, "\u00e9", "..", "a b"),
    _names(*(f"more{number}" for number in range(200))),
    _old_files,
    _of(shape=(2**40, 2**10)),
    _of(shape=(2**62,), dtype="u1"),
    _of(shape=(0, 2**62)),
    _of(shape=(1,) * 32),
    _of(),
    _of(chunks=True, shape=(50, 50)),
    _of(chunks=True, shape=(50, 50), compression="gzip"),
    _of(chunks=(7, 7), shape=(2**30, 2**30), shuffle=True, fletcher32=True),
    _of(shape=(10,), maxshape=(None,)),
    _of(dtype=">f4"),
    _of(dtype="<f8"),
    _of(dtype="?"),
    _of(dtype="<c8"),
    _of(dtype="S5"),
    _of(dtype=VOID),
    _of(dtype=np.dtype("V7")),
    _of(dtype=h5py.string_dtype()),
    _of(dtype=h5py.vlen_dtype("<i4")),
    _of(dtype=h5py.enum_dtype({"a": 1})),
    _of(dtype=h5py.ref_dtype),
    _of(dtype=np.dtype(("<f4", (2, 2)))),
)
