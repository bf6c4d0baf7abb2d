"""Prompts of one key: found in the tree, fetched from memory or files into caches, and stored from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cmr_plugins.prefix_cache.folder import Damage, Folder, file_bytes
from cmr_plugins.prefix_cache.key import difference, key_name
from cmr_plugins.prefix_cache.layout import Layout
from cmr_plugins.prefix_cache.tree import Node, Tree, block_name


class Store:
    """The blocks of one key in a tree that others share; `keys` are those the tree was used with so far."""

    def __init__(
        self, tree: Tree, layout: Layout, parts: dict[str, str], keys: list[dict[str, str]], folder: Any
    ) -> None:
        self.tree, self.layout, self.parts, self.keys = tree, layout, parts, keys
        self.root = key_name(parts)
        self.folder: Folder | None = folder

    # -- restoring --

    def restore(self, tokens: list[int], caches: Sequence[Any]) -> tuple[int, str]:
        """Fill caches with as much of tokens as is stored, all but the last at most.

        Returns how many that are, and why they are not more ('' where they could not be).
        """
        self._look()
        found = self.tree.match(self.root, np.array(tokens, np.int32))
        blocks, damage = self._fetch(found.nodes)
        count, why = found.count, found.why
        if damage:
            count, why = sum(len(node.tokens) for node in found.nodes[: len(blocks)]), damage
        count = min(count, len(tokens) - 1)
        nodes = found.nodes[: -(-count // self.tree.block)]
        if count:
            self.layout.fill(caches, blocks[: len(nodes)], [len(node.tokens) for node in nodes], count)
            self._touch(nodes)
        elif why in ("nothing stored further", "first difference") and not found.nodes:
            why = self._nothing() or why
        return count, why

    def _fetch(self, nodes: list[Node]) -> tuple[list[np.ndarray], str]:
        """The KV of consecutive blocks as far as it is whole, and what is wrong with the next."""
        blocks: list[np.ndarray] = []
        using = {node.name for node in nodes}
        self.tree.touch(nodes)
        for node in nodes:
            try:
                data = node.data if node.data is not None else self._read(node)
            except Damage as damage:
                for doubtful in nodes[len(blocks) :]:  # all behind are computed anyway and written anew
                    self._gone(doubtful.name, str(damage))
                return blocks, str(damage)
            self.tree.hold(node, data, using)
            blocks.append(data)
        return blocks, ""

    def _read(self, node: Node) -> np.ndarray:
        if self.folder is None:
            raise Damage("gone")
        return self.folder.read(node, len(node.tokens) * self.layout.token_bytes)

    def _nothing(self) -> str | None:
        """Why nothing at all is known under this key."""
        if self.tree.children.get(self.root):
            return None
        others = [parts for parts in self.keys if parts != self.parts]
        if self.folder is not None:
            others += self.folder.other_keys()
        return difference(self.parts, others) or "empty"

    def _look(self) -> None:
        """Learn what other processes stored and removed."""
        if self.folder is None:
            return
        came, gone, damaged = self.folder.changes()
        for known in came:
            n = len(known.tokens)
            if 0 < n <= self.tree.block and known.size == n * self.layout.token_bytes:
                node = self.tree.add(Node(known.name, known.parent, known.tokens))
                node.on_disk = node.on_disk or node.name == known.name
        for name in damaged:
            self.tree.lost[name] = "corrupted"
        for name in gone:
            self._gone(name)

    def _gone(self, name: bytes, why: str = "evicted") -> None:
        node = self.tree.nodes.get(name)
        if node is not None:
            node.on_disk = False
            if node.data is None:
                self.tree.drop(node, why)

    # -- storing --

    def store(self, tokens: list[int], caches: Sequence[Any]) -> str:
        """Keep the KV of tokens, which caches begin with; return '' or why nothing was to be had."""
        ids = np.array(tokens, np.int32)
        self._look()
        path = self._path(ids)
        wanted = [(node, at * self.tree.block) for at, node in enumerate(path) if not self._is_kept(node)]
        wanted = wanted[: self._capacity()]
        spans = [(start, start + len(node.tokens)) for node, start in wanted]
        blocks = self.layout.cut(caches, spans) if spans else []
        if blocks is None:
            return "positions are missing or stored otherwise"
        self._keep(path, {node.name: data for (node, _), data in zip(wanted, blocks)})
        self._touch([node for node in path if self._is_kept(node)])
        return ""

    def _path(self, ids: np.ndarray) -> list[Node]:
        """The blocks of a prompt, from the tree or new."""
        path, parent = [], self.root
        for start in range(0, len(ids), self.tree.block):
            tokens = ids[start : start + self.tree.block]
            name = block_name(parent, tokens)
            node = self.tree.nodes.get(name) or self._covering(parent, tokens)
            path.append(node or Node(name, parent, tokens.copy()))
            parent = name
        return path

    def _covering(self, parent: bytes, tokens: np.ndarray) -> Node | None:
        """A longer block that begins with the last tokens of a prompt."""
        if len(tokens) == self.tree.block:
            return None
        found = self.tree.match(parent, tokens)
        return found.nodes[0] if found.count == len(tokens) else None

    def _is_kept(self, node: Node) -> bool:
        return node.name in self.tree.nodes and (node.data is not None or node.on_disk)

    def _capacity(self) -> int:
        """How many blocks of one prompt can be held at all."""
        size = self.tree.block * (self.layout.token_bytes + 4)
        return max(self.tree.limit, self.folder.limit if self.folder else 0) // size + 1

    def _keep(self, path: list[Node], fresh: dict[bytes, np.ndarray]) -> None:
        """Put blocks into memory and files, the first first, until neither has room."""
        using = {node.name for node in path}
        self.tree.touch([node for node in path if self._is_kept(node)])
        room = self._room(path, fresh, using)
        for node in path:
            data = node.data if node.data is not None else fresh.get(node.name)
            if data is None:
                if node.on_disk:
                    continue
                return
            self.tree.add(node)
            self.tree.hold(node, data, using)
            size = file_bytes(len(node.tokens), len(data))
            if self.folder is not None and not node.on_disk and size <= room:
                node.on_disk = self.folder.write(node, data)
                room -= size if node.on_disk else room
            if not self._is_kept(node):
                self.tree.drop(node, "no room")
                return

    def _room(self, path: list[Node], fresh: dict[bytes, np.ndarray], using: set[bytes]) -> int:
        """The bytes that files may take now, after the least used have gone."""
        if self.folder is None:
            return 0
        kept = [
            node.data if node.data is not None else fresh.get(node.name) for node in path if not node.on_disk
        ]
        sizes = [file_bytes(self.tree.block, len(data)) for data in kept if data is not None]
        return self.folder.make_room(sum(sizes), using) if sizes else 0

    def _touch(self, nodes: list[Node]) -> None:
        self.tree.touch(nodes)
        if self.folder is not None:
            self.folder.touch(nodes)
