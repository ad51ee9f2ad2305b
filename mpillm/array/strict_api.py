"""The part of CuPy's API that the strict stand-in offers: names and arguments, as data.

Every name and keyword is in CuPy 13.6 and 14.2; a test compares where CuPy is installed. A form
such as "a axis * out keepdims" lists the arguments of a function, those after * by keyword only,
one with ... any number of times. Defaults are NumPy's, which CuPy shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "ARRAY",
    "ARRAYS",
    "ATOMIC",
    "BINARY_OPERATORS",
    "BORROWED",
    "ELEMENT_TYPES",
    "FUNCTIONS",
    "METHODS",
    "OPERAND",
    "OPERATORS",
    "SCATTERING",
    "SHORTHANDS",
    "UFUNCS",
    "Form",
]


@dataclass(frozen=True)
class Form:
    """The arguments that a function takes."""

    positional: tuple[str, ...]
    repeated: str | None
    keywords: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Form:
        """Read the notation above."""
        positional = text.partition("*")[0].split()
        repeated = None
        if positional and positional[-1].endswith("..."):
            repeated = positional.pop().removesuffix("...")
        return cls(tuple(positional), repeated, frozenset(text.replace("*", " ").split()))

    def label(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """What each positional argument is called. TypeError when the arguments do not fit."""
        labels = list(self.positional[: len(args)])
        if self.repeated:
            labels += [self.repeated] * (len(args) - len(labels))
        if len(args) > len(labels) or not kwargs.keys() <= self.keywords:
            raise TypeError(f"{name}: CuPy does not take {len(args)} arguments and {list(kwargs)}")
        return labels


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _parse(table: dict[str, str]) -> dict[str, Form]:
    """From names by form to form by name."""
    return {name: Form.parse(form) for form, names in table.items() for name in names.split()}


# Types of elements, as NumPy's characters.
ELEMENT_TYPES = "?bBhHiIlLqQefdFD"

# Names that CuPy itself takes from NumPy.
BORROWED = _names("""
    bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 intp float16 float32 float64 complex64
    complex128 generic number integer signedinteger unsignedinteger inexact floating dtype finfo
    iinfo issubdtype promote_types broadcast_shapes e inf nan newaxis pi
""")

# Elementwise functions of arrays and scalars, with the keywords `out`, `dtype` and `casting`.
UFUNCS = _names("""
    abs absolute add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_or
    bitwise_xor cbrt ceil copysign cos cosh divide equal exp exp2 expm1 fabs floor floor_divide fmax
    fmin fmod greater greater_equal hypot invert isfinite isinf isnan left_shift less less_equal log
    log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor maximum minimum mod
    multiply negative nextafter not_equal power reciprocal remainder right_shift rint sign signbit
    sin sinh sqrt square subtract tan tanh true_divide trunc
""")

# Those of them with `at`, and the types for which CuPy has the atomic operations behind it.
SCATTERING = _names("add maximum minimum")
ATOMIC = "iILQfd"

# Other functions.
FUNCTIONS = _parse(
    {
        "shape dtype order": "empty ones zeros",
        "prototype dtype order * shape": "empty_like",
        "a dtype order * shape": "ones_like zeros_like",
        "shape fill_value dtype order": "full",
        "a fill_value dtype order * shape": "full_like",
        "start stop step * dtype": "arange",
        "start stop num endpoint * dtype axis": "linspace",
        "N M k dtype": "eye tri",
        "m k": "tril triu",
        "a dtype": "ascontiguousarray",
        "a order": "copy ravel",
        "dst src casting where": "copyto",
        "a newshape * order": "reshape",
        "a axes": "transpose",
        "a axis1 axis2": "swapaxes",
        "a source destination": "moveaxis",
        "a axis": "count_nonzero expand_dims flip squeeze",
        "a shift axis": "roll",
        "a repeats axis": "repeat",
        "array shape": "broadcast_to",
        "args...": "broadcast_arrays",
        "tup axis out * dtype casting": "concatenate stack",
        "ary indices_or_sections axis": "array_split split",
        "a axis dtype out keepdims": "mean prod sum",
        "a axis dtype out ddof keepdims": "std var",
        "a axis out keepdims": "all amax amin any max min",
        "a axis * out keepdims": "argmax argmin",
        "a axis dtype out": "cumprod cumsum",
        "a axis * kind": "argsort sort",
        "a v side": "searchsorted",
        "a": "argwhere flatnonzero nonzero",
        "ar * return_index return_counts": "unique",
        "condition x y": "where",
        "a indices axis out": "take",
        "a indices axis": "take_along_axis",
        "a a_min a_max out": "clip",
        "a decimals out": "around round",
        "x * copy nan posinf neginf": "nan_to_num",
        "a b": "inner may_share_memory shares_memory vdot",
        "a b out": "dot outer",
        "a b axes": "tensordot",
        "a b * out dtype casting": "matmul",
        "operands... * dtype optimize": "einsum",
        "a b rtol atol equal_nan": "allclose isclose",
        "a1 a2 equal_nan": "array_equal",
    }
)

# Methods of arrays: those that are a function with the array as its first argument, and others.
SHORTHANDS = _names("""
    all any argmax argmin argsort clip cumprod cumsum dot max mean min nonzero prod ravel repeat
    round squeeze std sum swapaxes take var
""")
METHODS = _parse(
    {
        "dtype order * copy": "astype",
        "order": "copy flatten",
        "value": "fill",
        "shape... * order": "reshape",
        "axes...": "transpose",
        "dtype": "view",
    }
)

# Arguments that are an array, arrays, or an array or a scalar. The others are none of these.
ARRAY = _names("a a1 a2 ar array ary b condition dst m prototype v")
ARRAYS = _names("args operands tup")
OPERAND = _names("a_max a_min fill_value indices out src value where x y")

# Operators and the elementwise functions behind them; the second kind also reversed and in place.
OPERATORS = {
    "neg": "negative",
    "abs": "absolute",
    "invert": "invert",
    "lt": "less",
    "le": "less_equal",
    "eq": "equal",
    "ne": "not_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
BINARY_OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
    "lshift": "left_shift",
    "rshift": "right_shift",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
}
