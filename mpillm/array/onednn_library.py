"""oneDNN's shared library: where it is, what its functions take, and what their answers mean.

The names and numbers are those of oneDNN 3's C interface (`dnnl.h`, `dnnl_types.h`).
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

__all__ = ["INSTALL", "Argument", "OneDnnError", "load_library"]

INSTALL = "install it with: pip install 'mpillm[bf16]'"

# The wheel that brings the library, built for the GNU runtime's threads.
_WHEEL = "onednn-cpu-gomp"
_MAJOR = 3

# dnnl_status_t
_STATUS = (
    "success",
    "out_of_memory",
    "invalid_arguments",
    "unimplemented",
    "last_impl_reached",
    "runtime_error",
    "not_required",
)

_int, _size, _pointer, _float = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_float
_char, _long, _result = ctypes.c_char, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)
_dims = ctypes.POINTER(ctypes.c_int64)


class Argument(ctypes.Structure):
    """dnnl_exec_arg_t: the role of an array in a primitive, and its memory object."""

    _fields_ = (("role", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    """The beginning of dnnl_version_t."""

    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


_GEMM = (
    *(_char, _char, _long, _long, _long, _float),
    *(_pointer, _long, _pointer, _long, _float, _pointer, _long),
)

# What the functions that return a status take.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "dnnl_engine_create": (_result, _int, _size),
    "dnnl_stream_create": (_result, _pointer, ctypes.c_uint),
    "dnnl_memory_desc_create_with_strides": (_result, _int, _dims, _int, _dims),
    "dnnl_memory_desc_destroy": (_pointer,),
    "dnnl_memory_create": (_result, _pointer, _pointer, _pointer),
    "dnnl_memory_set_data_handle": (_pointer, _pointer),
    "dnnl_memory_destroy": (_pointer,),
    "dnnl_post_ops_create": (_result,),
    "dnnl_post_ops_append_sum": (_pointer, _float, ctypes.c_int32, _int),
    "dnnl_post_ops_destroy": (_pointer,),
    "dnnl_primitive_attr_create": (_result,),
    "dnnl_primitive_attr_set_post_ops": (_pointer, _pointer),
    "dnnl_primitive_attr_destroy": (_pointer,),
    "dnnl_matmul_primitive_desc_create": (_result, *[_pointer] * 6),
    "dnnl_reorder_primitive_desc_create": (_result, *[_pointer] * 5),
    "dnnl_primitive_desc_destroy": (_pointer,),
    "dnnl_primitive_create": (_result, _pointer),
    "dnnl_primitive_execute": (_pointer, _pointer, _int, ctypes.POINTER(Argument)),
    "dnnl_primitive_destroy": (_pointer,),
    "dnnl_sgemm": _GEMM,
    # Exported since version 1, but in no header: `dnnl_sgemm` with operands of bfloat16.
    "dnnl_gemm_bf16bf16f32": _GEMM,
}


class OneDnnError(RuntimeError):
    """oneDNN cannot be used here, or a call of it failed."""


def load_library() -> Any:
    """The library with the types of its functions set, of the wheel or else of the system.

    Each function raises `OneDnnError` where its status is not success. So does this one, where
    there is no library, or none that can be used.
    """
    problems = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
            version = _version(library)
            if version[0] == _MAJOR:
                _declare(library)
                _set_threads(library)
                return library
        except (OSError, AttributeError) as error:  # a library that it needs, or a function
            problems.append(f"{path} cannot be used ({error})")
        else:
            found = ".".join(map(str, version))
            problems.append(f"{path} is version {found}, expected {_MAJOR}")
    raise OneDnnError("; ".join(problems) or f"oneDNN is not installed; {INSTALL}")


def _candidates() -> Iterator[str]:
    """Paths of libraries to try, the wheel's first."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution(_WHEEL)
        names = [file for file in wheel.files or () if file.name.startswith("libdnnl.so")]
        # The wheel holds the same library under several names.
        yield from (str(wheel.locate_file(name)) for name in sorted(names)[:1])
    system = ctypes.util.find_library("dnnl")
    if system:
        yield system


def _version(library: Any) -> tuple[int, int, int]:
    library.dnnl_version.restype = ctypes.POINTER(_Version)
    version = library.dnnl_version().contents
    return version.major, version.minor, version.patch


def _declare(library: Any) -> None:
    for name, types in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype, function.errcheck = types, ctypes.c_int, _check
    library.dnnl_get_effective_cpu_isa.restype = ctypes.c_int


def _check(status: int, function: Any, arguments: Any) -> None:
    if status:
        name = _STATUS[status] if status < len(_STATUS) else f"status {status}"
        raise OneDnnError(f"{function.__name__}: {name}")


def _set_threads(library: Any) -> None:
    """As many threads as OpenMP is told, else as NumPy's BLAS is.

    The runtime itself reads its variable only once, which an MPI library may have made it do early.
    """
    told = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
    threads = next((text for text in told if text), "")
    if threads.isdigit() and int(threads) > 0 and hasattr(library, "omp_set_num_threads"):
        library.omp_set_num_threads(int(threads))
