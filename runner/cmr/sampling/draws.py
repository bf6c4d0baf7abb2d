"""Random numbers as a pure function of where they are used, so that any run can reproduce any draw."""

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # 2 ** 64 divided by the golden ratio


def uniform(seed: int, index: int, draw: int) -> float:
    """Return the number in [0, 1) that belongs to a seed, a generated token's index and a draw's number.

    Each of the three goes through the SplitMix64 finalizer (Steele, Lea and Flood 2014); 53 bits remain.
    """
    state = 0
    for word in (seed, index, draw):
        state = _mix((state + _STEP * (word + 1)) & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
