"""What is measured: so many prompt or generated tokens, at a depth, for several sequences, on threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One test as llama-bench names them; each of `parallel` sequences holds `depth` tokens before it."""

    n_prompt: int
    n_gen: int
    depth: int = 0
    parallel: int = 1
    threads: int = 1

    @property
    def name(self) -> str:
        """The test's name: pp512, tg128, pp512+tg128, with @ d4096 at a depth and x8 for eight sequences."""
        parts = [f"pp{self.n_prompt}"] * bool(self.n_prompt) + [f"tg{self.n_gen}"] * bool(self.n_gen)
        many = f" x{self.parallel}" if self.parallel > 1 else ""
        return "+".join(parts) + many + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        """The tokens that are timed, of all sequences together."""
        return (self.n_prompt + self.n_gen) * self.parallel

    @property
    def context(self) -> int:
        """The tokens that one sequence holds at the end."""
        return self.depth + self.n_prompt + self.n_gen


def cases(
    prompts: Sequence[int],
    gens: Sequence[int],
    depths: Sequence[int],
    parallels: Sequence[int],
    pairs: Sequence[tuple[int, int]] = (),
    threads: int = 1,
) -> Iterator[Case]:
    """Yield every test at one number of threads, shallow ones first; a size of 0 is no test.

    Prompts are read by one sequence: several would only be a longer one.
    """
    for depth in sorted(set(depths)):
        for size in prompts:
            if size:
                yield Case(size, 0, depth, 1, threads)
        for size, many in itertools.product(gens, parallels):
            if size:
                yield Case(0, size, depth, many, threads)
        for first, second in pairs:
            yield Case(first, second, depth, 1, threads)
