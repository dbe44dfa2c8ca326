"""Pickled batches without unpickling: stand-ins take the place of every global that a pickle names.

Nothing named in the file is ever called; a pickle builds the arrays, lists and dictionaries of a batch
or is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np


def load_pickle(content: bytes) -> Any:
    """What a pickle holds, of arrays, bytes, text, lists, tuples, dictionaries and numbers alone.

    Arrays come as `StandIn`, with the array in `.array`.

    Raises:
        Exception: of any kind, where it is damaged or asks for anything else.
    """
    for opcode, argument, _ in pickletools.genops(content):  # also checks the lengths against the file
        if "PUT" in opcode.name and (argument or 0) > len(content):
            raise pickle.UnpicklingError(f"memo {argument} in {len(content)} bytes")
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A fresh stand-in for each admitted global: one that the pickle altered is never met again."""
        if (module, name) == ("numpy", "dtype"):
            return lambda code, align=False, copy=False: _Dtype(code)
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: _encode_latin1(text, encoding)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda subtype, shape, code: StandIn()
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return lambda data, dtype, shape, order: StandIn().fill(shape, dtype, order == "F", data)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes; `_codecs.encode` itself would run any codec."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


class _Dtype:
    """A whole-number dtype; numpy's own would take flags and fields from the pickle."""

    __slots__ = ("code", "dtype")

    def __init__(self, code: str | bytes) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch(r"[iu][1248]", self.code):
            raise pickle.UnpicklingError(f"it holds an array of dtype {self.code!r}, not of whole numbers")
        self.dtype = np.dtype(self.code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "=") or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError("it holds an array of a structured dtype")
        self.dtype = np.dtype(order + self.code)


class StandIn:
    """An array under construction: an empty one is made first, and its contents follow."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, fortran, data)

    def fill(self, shape: tuple[int, ...], dtype: _Dtype, fortran: bool, data: bytes) -> StandIn:
        """Gives it its contents; itself."""
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("it holds an array without its bytes")
        self.array = np.frombuffer(data, dtype=dtype.dtype).reshape(shape, order="F" if fortran else "C")
        return self
