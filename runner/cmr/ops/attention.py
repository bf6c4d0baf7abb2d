"""Attention of the op table for CPUs: storing keys and values, and attending to what is stored."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cmr.evidence import BLOCK, Notes
from cmr.ops.kernels import attention, generated, jobs, noting, prompts
from cmr.ops.kernels.attend import SEGMENT
from cmr.ops.kernels.stored import span
from cmr.ops.kernels.writing import WRITERS
from cmr.ops.launcher import SMALL_WORK, Launcher, address_of, float_bits
from cmr.ops.pack import GROUPED, PACKED
from cmr.ops.program import Program
from cmr.ops.records import Segment

NO_NOTES = (0,) * len(noting.NOTES)
# Where places_of a segment stand in the fields: (field, first place, how many).
K_MOVES = ((0, 0, 3),)
V_MOVES = ((0, 3, 3), (jobs.STORE_ROWS.index("slots"), 6, 1))
ROOM = 8  # pieces of which partial results have room at least


@dataclass(eq=False, slots=True)
class Call:
    """One call of attend: queries float32 [n, heads, dim] at q_pos, segments, rule, and out [n, heads, dim_v].

    `notes` take the weights that slots get.
    """

    q: np.ndarray
    q_pos: np.ndarray
    segments: list[Segment]
    rule: Any
    out: np.ndarray
    notes: Notes | None = None

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.q.shape[1] // len(self.segments[0].k)

    @property
    def slots(self) -> int:
        """The most slots that a head has, over all segments."""
        return sum(segment.most for segment in self.segments)

    @property
    def work(self) -> int:
        """Elements of keys that are multiplied; slots count by whole blocks, as a recorded step has one team."""
        return self.q.size * (-(-self.slots // BLOCK) * BLOCK)

    def fields(self) -> tuple[int, ...]:
        """The fields of a job up to its scratch."""
        q, out, rule = self.q, self.out, self.rule
        n, heads, dim = q.shape
        scale = 1 / math.sqrt(dim) if rule.scale is None else rule.scale
        return (
            *(n, heads, len(self.segments[0].k), dim, out.shape[2]),
            *(address_of(self.q_pos), rule.window, rule.sinks, float_bits(scale), float_bits(rule.softcap)),
            0 if rule.sink_logits is None else address_of(rule.sink_logits),
            *(address_of(out), out.strides[0], len(self.segments)),
        )

    def note_fields(self, room: int = 0, each: int = 0) -> tuple[int, ...]:
        """The fields noting.NOTES, with room for weights, `each` bytes for a thread."""
        notes = self.notes
        if notes is None:
            return NO_NOTES
        if notes.places is None:
            sums, rows = notes.sums, notes.rows
            places = (0, 0, 0) if rows is None else (address_of(rows), rows.strides[0], rows.strides[1])
            notes.places = (address_of(sums), sums.strides[0], *places)
        return (*notes.places, notes.fold, notes.since, room, each)


class AttentionOps(Launcher):
    """What `cmr.ops.table.Ops` says of keys and values."""

    def kv_store(self, segment: Segment, k_new: np.ndarray, v_new: np.ndarray, pos: np.ndarray) -> None:
        n, used, places = len(pos), segment.used, places_of(segment)
        by_head, first = (0, used) if isinstance(used, int) else (address_of(used), 0)
        pos = np.ascontiguousarray(pos, np.int32)
        where = (places[6], segment.pos_stride, address_of(pos))
        k_part = (segment.k_type, k_new, segment.turned_k, K_MOVES, (0, 0, 0))
        v_part = (segment.v_type, v_new, segment.turned_v, V_MOVES, where)
        for type, source, turned, moves, where in (k_part, v_part):
            source = self._turned(source) if turned else source
            _, at, count = moves[0]
            target = (*places[at : at + count], first)
            if type in GROUPED:
                self._store_groups(target, source)
                continue
            fields = (
                *(*target, by_head, address_of(source), source.strides[0], source.strides[1]),
                *(n, source.shape[1], source.shape[2], self.kernel(WRITERS[type]), *where),
            )
            start = self._run("store_rows", source.size, fields)
            if self._program is not None:
                self._program.firsts.append(start + jobs.STORE_ROWS.index("first"))
                self._program.moves += [(start + field, at, count) for field, at, count in moves]

    def _store_groups(self, target: tuple[int, ...], source: np.ndarray) -> None:
        """Pack whole groups of rows, float32 [n, heads, dim], into slots: address, strides, the first of them."""
        if self._program is not None:
            self._program.whole = False  # where groups go is not foretold
        n, heads, dim = source.shape
        fields = (
            *(*target, address_of(source), source.strides[0], source.strides[1]),
            *(n, heads, dim, self.kernel("pack_group")),
        )
        self._run("store_groups", source.size, fields)

    def _turned(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rotate heads, float32 [n, heads, dim], into scratch that the next product may use, or into `out`."""
        if out is None:
            memory = (ctypes.c_float * x.size).from_address(self._x.reach(x.nbytes))
            out = np.ctypeslib.as_array(memory).reshape(x.shape)
        n, heads, dim = x.shape
        ends = (address_of(x), *x.strides[:2], address_of(out), *out.strides[:2])
        self._run("turn_rows", x.size, (*ends, n, heads, dim, self.kernel(f"turn:{dim}")))
        return out

    def attend(
        self,
        q: np.ndarray,
        q_pos: np.ndarray,
        segments: list[Segment],
        rule: Any,
        out: np.ndarray,
        prompt: bool,
        notes: Notes | None = None,
    ) -> None:
        turned_k, turned_v = segments[0].turned_k, segments[0].turned_v
        q = self._turned(q) if turned_k else q
        call = Call(q, np.ascontiguousarray(q_pos, np.int32), segments, rule, out, notes)
        if q.shape[2] % 16 or out.shape[2] % 16:
            self._attend_padded(call, prompt)
        elif prompt:
            self._attend_prompt(call)
        else:
            self._attend_decode(call)
        if turned_v:
            self._turned(out, out)

    def _attend_prompt(self, call: Call) -> None:
        """Attention of a prompt's rows, a running softmax over tiles of slots."""
        dim, dim_v, group = call.q.shape[2], call.out.shape[2], call.group
        blocks = value_blocks(dim_v)
        scratch = self._threads_scratch(prompts.scratch_bytes(group, dim, dim_v))
        multiply = (self.kernel("small_gemm:4:0"), self.kernel(f"small_gemm:{blocks}:1"), blocks)
        notes = call.note_fields(*self._notes_room(call)) if call.notes else NO_NOTES
        tokens = prompts.tokens(group)
        fields = [*call.fields(), *scratch, tokens, *multiply, self.kernel("scale_row"), *notes]
        for segment in call.segments:
            keys = "load_groups" if segment.k_type in GROUPED else f"load_tile:{segment.k_type}:1"
            kernels = (keys, f"load_tile:{segment.v_type}:0")
            fields += self._segment(call, segment, kernels)
        self._run("attend_prompt", call.work, tuple(fields), True, 1)

    def _attend_decode(self, call: Call) -> None:
        """Attention of a few generated rows, each piece of 512 slots by itself."""
        n, heads, _ = call.q.shape
        dim_v = call.out.shape[2]
        tile = min(4, 1 << (n * call.group - 1).bit_length())
        pieces = sum(max(1, -(-segment.most // attention.PIECE)) for segment in call.segments)
        # Recorded steps go on with more pieces as long as there is room for them.
        ample = max(ROOM, 1 << (pieces - 1).bit_length())
        partials = self._partials.reach(n * heads * ample * generated.piece_bytes(dim_v))
        scratch = self._threads_scratch(generated.scratch_bytes(dim_v))
        room = 0
        if call.notes is not None:
            kv_heads = len(call.segments[0].k)
            room = self._notes.reach(noting.decode_room_bytes(n * call.group, kv_heads, pieces, tile))
        fields = [*call.fields(), *scratch, tile, partials, *call.note_fields(room)]
        for segment in call.segments:
            blocks = value_blocks(dim_v, span(segment.v_type))
            kernels = (_reader("scores", segment.k_type, tile), _reader("mix", segment.v_type, tile, blocks))
            fields += self._segment(call, segment, kernels)
        start = self._run("attend_decode", call.work, tuple(fields), False, 1)
        if self._program is not None:
            self._note(call, ample - pieces, start + len(generated.FIELDS))

    def _notes_room(self, call: Call) -> tuple[int, int]:
        """Room for the weights of a prompt's work items: address, and bytes for each thread."""
        each = noting.prompt_room_bytes(prompts.tokens(call.group) * call.group, call.slots)
        each = (each + 63) // 64 * 64
        return self._notes.reach(each * self._pool.threads), each

    def _segment(self, call: Call, segment: Segment, kernels: tuple[str, str]) -> tuple[int, ...]:
        """The fields SEGMENT."""
        used, tiles = segment.used, segment.tiles
        q = call.q if segment.q is None else segment.q
        return (
            *(*places_of(segment), segment.pos_stride),
            *(segment.most, 0 if isinstance(used, int) else address_of(used)),
            *(address_of(q), q.strides[0]),
            *((0, 0) if tiles is None else (address_of(tiles), tiles.strides[0])),
            *map(self.kernel, kernels),
            *(self.kernel("softmax:1" if segment.aged else "softmax"), *segment.low, *segment.high),
        )

    def _note(self, call: Call, room: int, start: int) -> None:
        """Note in the program being recorded which fields change with the segments, and how far they may grow.

        There is `room` for so many pieces more.
        """
        program = self._program
        assert program is not None
        few = (SMALL_WORK - 1) // call.q.size // BLOCK * BLOCK
        for segment in call.segments:
            if segment.grows:
                program.counts.append(start + SEGMENT.index("used"))
                program.moves.append((start + SEGMENT.index("k"), 0, 7))
                program.few.append((len(program.jobs) - 1, few - call.slots + segment.most))
                pieces = max(1, -(-segment.most // attention.PIECE)) + room
                program.limit = min(program.limit, pieces * attention.PIECE)
            start += len(SEGMENT)

    def places(self, segment: Segment) -> memoryview:
        """Return what move() needs to know of a segment, as long as its arrays stay where they are."""
        return memoryview(np.array(places_of(segment), np.int64))

    def move(self, program: Program, kind: Any, places: memoryview, slots: int) -> None:
        """Let jobs of a recorded step read and write another segment alike, of which `slots` will be in use.

        `kind` has what the program noted of them: moves and few.
        """
        program.move(kind.moves, places)
        for job, few in kind.few:
            program.table[job, 2] = 1 if slots <= few else self.threads

    def _attend_padded(self, call: Call, prompt: bool) -> None:
        """Attention for head sizes that vectors do not divide, on copies padded with zeros: correct, not fast."""
        if self._program is not None:
            self._program.whole = False  # the copies are no jobs
        q, out, rule = call.q, call.out, call.rule
        scale = 1 / math.sqrt(q.shape[2]) if rule.scale is None else rule.scale
        there = np.empty((*out.shape[:2], _padded(out.shape[2])), np.float32)
        segments = []
        for segment in call.segments:
            k, v = map(widened, segment.held())
            own = None if segment.q is None else widened(segment.q)
            segments.append(Segment(k, v, segment.pos, segment.used, q=own, tiles=segment.tiles))
        rule = replace(rule, scale=scale)
        self.attend(widened(q), call.q_pos, segments, rule, there, prompt, call.notes)
        out[:] = there[..., : out.shape[2]]


def places_of(segment: Segment) -> tuple[int, ...]:
    """Return where keys and values lie, with the bytes between heads and between slots, and where positions do."""
    k, v = segment.k, segment.v
    k_place, v_place = (address_of(k), *k.strides[:2]), (address_of(v), *v.strides[:2])
    return (*k_place, *v_place, address_of(segment.pos))


def _reader(name: str, type: str, *parameters: int) -> str:
    """The key of the kernel that reads keys ("scores") or values ("mix") of a type for generated rows."""
    if type in GROUPED:
        return ":".join(map(str, (f"{name}_of_groups", *parameters)))
    return ":".join(map(str, (f"{name}_of_blocks" if type in PACKED else name, *parameters, type)))


def value_blocks(dim_v: int, span: int = 16) -> int:
    """How many vectors of a value's row are summed at once; so many values are unpacked together."""
    return next(size for size in (4, 3, 2, 1) if dim_v // 16 % size == 0 and 16 * size % span == 0)


def _padded(dim: int) -> int:
    return (dim + 15) // 16 * 16


def widened(a: np.ndarray) -> np.ndarray:
    """A float32 copy of [.., .., d] with zeros up to a multiple of 16."""
    out = np.zeros((*a.shape[:2], _padded(a.shape[2])), np.float32)
    out[..., : a.shape[2]] = a
    return out
