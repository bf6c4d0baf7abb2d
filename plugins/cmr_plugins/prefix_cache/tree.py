"""A radix tree over tokens in blocks: which beginnings of prompts are known, and whose KV is in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

REMEMBERED = 1 << 16  # names of blocks that were lost, so that a miss can say why


def block_name(parent: bytes, tokens: np.ndarray) -> bytes:
    """Return the 16 bytes that stand for a block, int32 tokens, behind all that its parent stands for."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()


@dataclass(eq=False, slots=True)
class Node:
    """One block: its tokens, int32 [n], behind those of `parent`, and their KV if it is in memory."""

    name: bytes
    parent: bytes
    tokens: np.ndarray
    data: np.ndarray | None = None
    on_disk: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays in memory."""
        return 0 if self.data is None else self.data.nbytes + self.tokens.nbytes


@dataclass
class Match:
    """How far a prompt is known: blocks from the root on, how many tokens they share, and why no more."""

    nodes: list[Node] = field(default_factory=list)
    count: int = 0
    why: str = ""


class Tree:
    """Blocks of `block` tokens; those behind which another lies are full. Roots are any 16 bytes.

    KV in memory takes `limit` bytes at most; blocks go in the order of their last use, a parent after its
    children.
    """

    def __init__(self, limit: int, block: int) -> None:
        self.limit, self.block, self.nbytes, self.evicted = limit, block, 0, 0
        self.nodes: dict[bytes, Node] = {}
        self.children: dict[bytes, dict[bytes, Node]] = {}
        self.recent: OrderedDict[bytes, Node] = OrderedDict()
        self.lost: OrderedDict[bytes, str] = OrderedDict()

    def match(self, root: bytes, tokens: np.ndarray) -> Match:
        """Follow tokens, int32 [n], from a root as far as blocks hold the very same ones."""
        found, parent = Match(), root
        while found.count < len(tokens):
            rest = tokens[found.count : found.count + self.block]
            name = block_name(parent, rest)
            node = self.nodes.get(name)
            if node is None or not np.array_equal(node.tokens, rest):
                self._part(found, parent, rest)
                found.why = self.lost.get(name, found.why)
                break
            found.nodes.append(node)
            found.count, parent = found.count + len(rest), name
        return found

    def _part(self, found: Match, parent: bytes, rest: np.ndarray) -> None:
        """Go on into the block behind parent that shares most with rest, and note why no further."""
        most, best = 0, None
        for node in self.children.get(parent, {}).values():
            shared = _shared(node.tokens, rest)
            if shared > most:
                most, best = shared, node
        found.why = "first difference" if self.children.get(parent) else "nothing stored further"
        if best is not None:
            found.nodes.append(best)
            found.count += most
            if most == len(rest):
                found.why = ""
            elif most == len(best.tokens):
                found.why = "nothing stored further"

    def add(self, node: Node) -> Node:
        """Make a block known, in place of shorter ones that it begins with; return it, or one that has it."""
        if node.name in self.nodes:
            return self.nodes[node.name]
        for other in list(self.children.get(node.parent, {}).values()):
            short = min(len(other.tokens), len(node.tokens))
            if short < self.block and np.array_equal(other.tokens[:short], node.tokens[:short]):
                if short == len(node.tokens):
                    return other
                self.drop(other)
        self.nodes[node.name] = self.children.setdefault(node.parent, {})[node.name] = node
        self.lost.pop(node.name, None)
        return node

    def drop(self, node: Node, why: str = "") -> None:
        """Forget a block, and remember why, if told; blocks behind it stay, and count once it is back."""
        self._unload(node)
        if self.nodes.pop(node.name, None) is None:
            return
        siblings = self.children[node.parent]
        del siblings[node.name]
        if not siblings:
            del self.children[node.parent]
        if why:
            self.lost[node.name] = why
        if len(self.lost) > REMEMBERED:
            self.lost.popitem(last=False)

    def hold(self, node: Node, data: np.ndarray, using: set[bytes]) -> bool:
        """Keep a block's KV in memory, in place of others not in `using`; return whether it fits."""
        if node.data is not None:
            return True
        size = data.nbytes + node.tokens.nbytes
        if size > self.limit or not self._make_room(size, using):
            return False
        node.data = data
        self.recent[node.name] = node
        self.nbytes += size
        return True

    def touch(self, nodes: Iterable[Node]) -> None:
        """Count blocks, given from the root on, as used now, the first of them last."""
        for node in reversed(list(nodes)):
            if node.data is not None:
                self.recent.move_to_end(node.name)

    def _make_room(self, size: int, using: set[bytes]) -> bool:
        while self.nbytes + size > self.limit:
            name, node = next(iter(self.recent.items()))
            if name in using:
                return False
            self.evicted += 1
            if node.on_disk:
                self._unload(node)
            else:
                self.drop(node, "evicted")
        return True

    def _unload(self, node: Node) -> None:
        if self.recent.pop(node.name, None) is not None:
            self.nbytes -= node.nbytes
            node.data = None


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements are the same."""
    if a[0] != b[0]:
        return 0
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n
