"""Vectors as they lie: what moves, joins, parts and combines their lanes."""

from llvmlite import ir

from .control import Control
from .elements import I32, const, vec


class Lanes(Control):
    """Emits code that moves lanes."""

    def cast(self, value, element, count):
        kind = element if count == 1 else vec(element, count)
        return value if value.type == kind else self.b.bitcast(value, kind)

    def shuffle(self, x, y, order):
        if y is None:
            y = ir.Constant(x.type, ir.Undefined)
        return self.b.shuffle_vector(x, y, const(I32, order))

    def join(self, parts):
        """Concatenate vectors of one type; their number is a power of two."""
        while len(parts) > 1:
            wide = range(2 * parts[0].type.count)
            parts = [self.shuffle(parts[i], parts[i + 1], wide) for i in range(0, len(parts), 2)]
        return parts[0]

    def part(self, x, start, count):
        return x if count == x.type.count else self.shuffle(x, None, range(start, start + count))

    def halves(self, x):
        half = x.type.count // 2
        return self.part(x, 0, half), self.part(x, half, half)

    def splat(self, scalar, count):
        kind = vec(scalar.type, count)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle(one, None, [0] * count)

    def lane(self, x, index):
        return self.b.extract_element(x, I32(index))

    def reduce(self, x, combine):
        """Combine all lanes, halving each time, so that the order is the same on every target."""
        while x.type.count > 1:
            low, high = self.halves(x)
            x = combine(low, high)
            if x.type.count == 1:
                break
        return self.lane(x, 0)

    def sum(self, x):
        return self.reduce(x, self.b.fadd)

    def sum_each(self, vectors):
        """Sum the lanes of 16 vectors of 16 into one vector of 16 sums, each in the order of `sum`.

        Each step adds to half of the lanes of two vectors the other half: one mask and one permutation for two sums.
        """
        # Steps take the bits of an index from the highest on.
        vectors = [vectors[int(f"{i:04b}"[::-1], 2)] for i in range(16)]
        for step in (8, 4, 2, 1):
            own = [lane + (lane & step and 16) for lane in range(16)]
            other = [lane ^ step for lane in own]
            pairs = zip(vectors[::2], vectors[1::2])
            vectors = [self.b.fadd(self.shuffle(a, b, own), self.shuffle(a, b, other)) for a, b in pairs]
        return vectors[0]

    def transpose(self, rows):
        """Transpose each n by n lanes of n vectors of 16 32-bit lanes; n is 4, 8 or 16."""
        count = len(rows)

        def stage(pairs, low, high):
            out = [None] * count
            for a, b in pairs:
                out[a], out[b] = self.shuffle(rows[a], rows[b], low), self.shuffle(rows[a], rows[b], high)
            return out

        for distance in (d for d in (1, 2, 4, 8) if d < count):
            pairs = [(i, i + distance) for i in range(count) if not i & distance]
            low = [j if not j & distance else 16 + j - distance for j in range(16)]
            high = [j + distance if not j & distance else 16 + j for j in range(16)]
            rows = stage(pairs, low, high)
        return rows
