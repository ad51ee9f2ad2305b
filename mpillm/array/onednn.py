"""Matrix products and bfloat16 copies by oneDNN.

Two matrices go through its BLAS-like calls: on the CPUs measured they are the fastest it has, in
any layout of the operands, and want neither descriptors nor packed weights. Stacks of matrices and
copies go through primitives, for which oneDNN compiles code for one set of shapes and strides in
half a millisecond; those made last are kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from typing import Any

import numpy as np

from mpillm.array.blas import stored
from mpillm.array.onednn_library import INSTALL, Argument, OneDnnError, load_library

__all__ = ["OneDnn", "OneDnnError"]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)

_BF16, _F32 = 2, 3  # dnnl_data_type_t

# DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST; a copy goes from the first to the last.
_SRC, _WEIGHTS, _DST = 1, 33, 17

_CPU, _IN_ORDER = 1, 1  # dnnl_engine_kind_t, dnnl_stream_flags_t

# dnnl_cpu_isa_avx512_core_bf16: bits that every instruction set with bfloat16 products has.
_ISA_BF16 = 0xE7

# Primitives kept: many more than a training step needs; decoding needs new ones at every token.
_KEPT = 512


class OneDnn:
    """The library with an engine and a stream, for one thread of Python at a time.

    It computes with `OMP_NUM_THREADS` threads, else `OPENBLAS_NUM_THREADS`, else one a core.
    OneDnnError where oneDNN, or ml_dtypes for the type of its operands, is not installed.
    """

    def __init__(self) -> None:
        try:
            import ml_dtypes
        except ImportError as error:
            raise OneDnnError(f"ml_dtypes cannot be imported ({error}); {INSTALL}") from None
        self._dnnl = load_library()
        self.bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        self._codes = {self.bfloat16: _BF16, _FLOAT32: _F32}
        self._gemm = {
            self.bfloat16: self._dnnl.dnnl_gemm_bf16bf16f32,
            _FLOAT32: self._dnnl.dnnl_sgemm,
        }
        self._engine = self._make("dnnl_engine_create", _CPU, 0)
        self._stream = self._make("dnnl_stream_create", self._engine, _IN_ORDER)
        self._primitives: dict[Hashable, _Primitive] = {}

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the CPU, as far as oneDNN is to use it, has bfloat16 products."""
        isa: int = self._dnnl.dnnl_get_effective_cpu_isa()
        return isa & _ISA_BF16 == _ISA_BF16

    def matmul(self, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
        """The product a @ b, in `out` where given, added to it with `accumulate`.

        a: (..., m, k), b: (..., k, n), both bfloat16 or both float32, of any strides; leading axes
        are broadcast. out: float32 (..., m, n), apart from the operands. Terms are summed in
        float32. Returns the product, float32, or `out`. TypeError for other types.
        """
        if a.dtype != b.dtype or a.dtype not in self._codes:
            raise TypeError(f"a product of {a.dtype} and {b.dtype}: expected two of one type")
        shape = (*_broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        if out is None:
            out, accumulate = np.empty(shape, _FLOAT32), False
        elif out.dtype != _FLOAT32:
            raise TypeError(f"a product in {out.dtype}: expected float32")
        if a.shape[-1] != b.shape[-2] or out.shape != shape:
            raise ValueError(f"a product of {a.shape} and {b.shape} in {out.shape} does not fit")
        if out.size == 0:
            return out
        if a.size == 0:  # sums of no terms
            if not accumulate:
                out[...] = 0.0
        elif len(shape) == 2:
            self._matrices(a, b, out, accumulate)
        else:
            self._stacks(a, b, out, accumulate)
        return out

    def to_bfloat16(self, x: Any) -> Any:
        """A C-contiguous bfloat16 copy of a float32 array, rounded to nearest, ties to even.

        As in the products, numbers below float32's smallest normal one count as zero.
        """
        out = np.empty(x.shape, self.bfloat16)
        if x.size == 0:
            return out
        source, target = (x.reshape(-1), out.reshape(-1)) if x.flags.c_contiguous else (x, out)
        key = source.shape, source.strides
        primitive = self._primitives.get(key)
        if primitive is None:
            layout = _layout(source)
            if layout is None or layout[0] != source.shape:
                return self.to_bfloat16(np.ascontiguousarray(x))
            primitive = self._new_copy(key, layout, _layout(target))
        self._run(primitive, (source, target))
        return out

    # -- two matrices --------------------------------------------------------------------------

    def _matrices(self, a: Any, b: Any, out: Any, accumulate: bool) -> None:
        place = stored(out)
        if place is None:
            total = np.ascontiguousarray(out)
            self._matrices(a, b, total, accumulate)
            out[...] = total
        elif place[0]:
            self._matrices(b.T, a.T, out.T, accumulate)
        else:
            (m, k), n = a.shape, b.shape[1]
            a, (trans_a, stride_a) = _placed(a)
            b, (trans_b, stride_b) = _placed(b)
            self._gemm[a.dtype](
                *(trans_a, trans_b, m, n, k, 1.0, _address(a), stride_a),
                *(_address(b), stride_b, float(accumulate), _address(out), place[1]),
            )

    # -- stacks of matrices --------------------------------------------------------------------

    def _stacks(self, a: Any, b: Any, out: Any, accumulate: bool) -> None:
        key = (a.dtype, a.shape, a.strides, b.shape, b.strides, out.shape, out.strides, accumulate)
        primitive = self._primitives.get(key)
        if primitive is None:
            layouts = [_layout(x, out.ndim) for x in (a, b, out)]
            if None in layouts or layouts[2][0] != out.shape:  # type: ignore[index]
                total = np.ascontiguousarray(out)
                self._stacks(np.ascontiguousarray(a), np.ascontiguousarray(b), total, accumulate)
                out[...] = total
                return
            primitive = self._new_product(key, a.dtype, layouts, accumulate)
        self._run(primitive, (a, b, out))

    def _new_copy(self, key: Hashable, source: Any, target: Any) -> _Primitive:
        arrays = [self._describe(_FLOAT32, *source), self._describe(self.bfloat16, *target)]
        places = arrays[0], self._engine, arrays[1], self._engine, None
        copy = self._make("dnnl_reorder_primitive_desc_create", *places)
        return self._keep(key, copy, arrays, (_SRC, _DST))

    def _new_product(
        self, key: Hashable, dtype: np.dtype[Any], layouts: list[Any], accumulate: bool
    ) -> _Primitive:
        attributes = None
        if accumulate:
            attributes = self._make("dnnl_primitive_attr_create")
            sums = self._make("dnnl_post_ops_create")
            self._dnnl.dnnl_post_ops_append_sum(sums, 1.0, 0, 0)
            self._dnnl.dnnl_primitive_attr_set_post_ops(attributes, sums)
            self._dnnl.dnnl_post_ops_destroy(sums)
        types = dtype, dtype, _FLOAT32
        a, b, out = (self._describe(t, *x) for t, x in zip(types, layouts, strict=True))
        product = self._make(
            "dnnl_matmul_primitive_desc_create", self._engine, a, b, None, out, attributes
        )
        if attributes is not None:
            self._dnnl.dnnl_primitive_attr_destroy(attributes)
        return self._keep(key, product, [a, b, out], (_SRC, _WEIGHTS, _DST))

    # -- primitives ----------------------------------------------------------------------------

    def _make(self, function: str, *arguments: Any) -> Any:
        """The object that a function of the library creates."""
        handle = ctypes.c_void_p()
        getattr(self._dnnl, function)(ctypes.byref(handle), *arguments)
        return handle

    def _describe(
        self, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Any:
        """A memory descriptor; strides in elements."""
        dims = ctypes.c_int64 * len(shape)
        create = "dnnl_memory_desc_create_with_strides"
        return self._make(create, len(shape), dims(*shape), self._codes[dtype], dims(*strides))

    def _keep(
        self, key: Hashable, descriptor: Any, arrays: list[Any], roles: tuple[int, ...]
    ) -> _Primitive:
        """Make and keep the primitive of a descriptor; all descriptors are given back."""
        dnnl = self._dnnl
        primitive = _Primitive(
            self._make("dnnl_primitive_create", descriptor),
            [self._make("dnnl_memory_create", array, self._engine, None) for array in arrays],
            roles,
        )
        dnnl.dnnl_primitive_desc_destroy(descriptor)
        for array in arrays:
            dnnl.dnnl_memory_desc_destroy(array)
        if len(self._primitives) >= _KEPT:
            oldest = self._primitives.pop(next(iter(self._primitives)))
            dnnl.dnnl_primitive_destroy(oldest.handle)
            for memory in oldest.memories:
                dnnl.dnnl_memory_destroy(memory)
        self._primitives[key] = primitive
        return primitive

    def _run(self, primitive: _Primitive, arrays: tuple[Any, ...]) -> None:
        for memory, array in zip(primitive.memories, arrays, strict=True):
            self._dnnl.dnnl_memory_set_data_handle(memory, _address(array))
        self._dnnl.dnnl_primitive_execute(
            primitive.handle, self._stream, len(arrays), primitive.arguments
        )


class _Primitive:
    """A primitive, and memory objects that are pointed at the arrays of each call."""

    def __init__(self, handle: Any, memories: list[Any], roles: tuple[int, ...]) -> None:
        self.handle = handle
        self.memories = memories
        pairs = zip(roles, memories, strict=True)
        self.arguments = (Argument * len(roles))(*(Argument(*pair) for pair in pairs))


def _address(x: Any) -> int:
    address: int = x.ctypes.data
    return address


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return a if a == b else np.broadcast_shapes(a, b)


def _placed(x: Any) -> tuple[Any, tuple[bytes, int]]:
    """A matrix, or a copy of it that BLAS can read, and how it lies."""
    place = stored(x)
    if place is None:
        return np.ascontiguousarray(x), (b"N", x.shape[1])
    turned, stride = place
    return x, (b"T" if turned else b"N", stride)


def _layout(x: Any, axes: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shape and strides, in elements, that oneDNN is told; None where it cannot be told them.

    Axes of length 1 are put before the others until there are `axes`. An axis before the last two
    along which nothing changes is told as of length 1: it is broadcast.
    """
    lead, size = max(axes - x.ndim, 0), x.itemsize
    shape = [1] * lead + list(x.shape)
    strides = [0] * lead + [stride // size for stride in x.strides]
    if any(stride % size for stride in x.strides):
        return None
    for axis in range(len(shape) - 2):
        if strides[axis] == 0:
            shape[axis] = 1
    end = 1  # of what the axes with shorter strides span
    order = sorted((axis for axis, n in enumerate(shape) if n > 1), key=strides.__getitem__)
    for axis in order:
        if strides[axis] < end:  # overlaps itself, or runs backwards
            return None
        end = strides[axis] * shape[axis]
    if order and strides[order[0]] != 1:
        return None
    if order and order[0] < len(shape) - 2 and shape[-2:] != [1, 1]:  # slow, if done at all
        return None
    return tuple(shape), tuple(
        end if n == 1 else stride for n, stride in zip(shape, strides, strict=True)
    )
