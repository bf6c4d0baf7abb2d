"""How rows of keys and values lie in a cache, by type: unpacked to float32 in registers, and written."""

from .emit import emitter
from .vector import F32

# The kernel that writes a row of each type: target, source (float32), count.
WRITERS = {"F16": "to_half", "F32": "copy_row"}


def span(type):
    """How many values of a row are unpacked at once: a multiple of 16 that divides every row."""
    return 16


def unpack(v, type, row, at):
    """The values of a row from index `at` on, span(type) of them, as vectors of 16 float32."""
    if type == "F16":
        return [v.load_half(v.add(row, v.mul(at, 2)), 16)]
    return [v.load(v.add(row, v.mul(at, 4)), F32, 16)]


@emitter("copy_row")
def copy_row(v, args):
    """Copy float32: target, source, count."""
    target, source, count = args[:3]
    v.copy(target, source, v.mul(count, 4))
