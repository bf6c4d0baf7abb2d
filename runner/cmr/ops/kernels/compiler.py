"""Compile an emitter with numba: vector code inside a function of twelve integers."""

from __future__ import annotations

import re
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic

from .emit import ARGUMENTS, EMITTERS, TARGET
from .vector import I64, Vectors

SIGNATURE = types.int64(*[types.int64] * ARGUMENTS)


@intrinsic(prefer_literal=True)
def emit(typingctx, key, args):
    """Write the emitter named by the literal key at this place of a numba function."""
    name, *parameters = key.literal_value.split(":")

    def generate(context, builder, signature, values):
        v = Vectors(builder, TARGET)
        fields = [builder.extract_value(values[1], i) for i in range(len(args))]
        result = EMITTERS[name](v, fields, *parameters)
        return I64(0) if result is None else result

    return types.int64(key, args), generate


def compile_native(key: str) -> Any:
    """Return numba's C callback of the kernel with this key; its symbol is unique to the key."""

    def kernel(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11):
        return emit(key, (a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11))

    kernel.__name__ = kernel.__qualname__ = "cmr_" + re.sub(r"\W", "_", key)
    return numba.cfunc(SIGNATURE, error_model="numpy")(kernel)
