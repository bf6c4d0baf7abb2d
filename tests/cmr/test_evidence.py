"""Evidence of attention: the weights that slots got, against float64, and where they go with their slots."""

import pickle

import numpy as np
import pytest
from tests.toy import MODEL, PROMPT, Copies, Together, answer, run

from cmr import AttnRule, LayerCache, PluginError, Session, hookimpl
from cmr.ops import open_ops

RULES = (AttnRule(), AttnRule(window=20), AttnRule(window=20, sinks=4), AttnRule(softcap=2.0, scale=0.7))
RULES += (AttnRule(sink_logits=np.float32([-1, 0.5, 3, 8, 0, 2])),)
HEADS, KV_HEADS, DIM = 6, 2, 16
SHAPES = [(1, 1, 16, 16), (4, 2, 64, 64), (7, 1, 24, 8), (8, 8, 32, 16), (32, 2, 16, 48)]
UNIT = 2.0**-24


@pytest.fixture(scope="module")
def ops(device):
    table = open_ops(device, threads=2)
    yield table
    table.close()


@pytest.fixture
def cache(ops):
    made = LayerCache(ops, KV_HEADS, DIM)
    made.note("cumulative-weights")
    return made


class Text:
    """Random queries, keys and values for positions 0 to n - 1."""

    def __init__(self, n, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, dim_v=DIM):
        rng = np.random.default_rng(0)
        self.n, self.pos, self.heads, self.kv_heads = n, np.arange(n, dtype=np.int32), heads, kv_heads
        self.q = 2 * rng.standard_normal((n, heads, dim)).astype(np.float32)
        self.k, self.v = (rng.standard_normal((n, kv_heads, d)).astype(np.float32) for d in (dim, dim_v))

    def feed(self, cache, start, stop, rule=RULES[0], prompt=True):
        """Append and attend to rows start to stop; the output."""
        rows = slice(start, stop)
        out = np.full((stop - start, self.heads, self.v.shape[2]), np.nan, np.float32)
        cache.append(self.k[rows], self.v[rows], self.pos[rows])
        cache.attend(self.q[rows], self.pos[rows], rule, out, prompt)
        return out

    def weights(self, rule, rows):
        """The weights of each row's heads in float64, keys as the cache has them: [len(rows), heads, n]."""
        k = np.repeat(self.k.astype(np.float16).astype(np.float64), self.heads // self.kv_heads, axis=1)
        scores = np.einsum("nhd,thd->nht", self.q[rows].astype(np.float64), k)
        scores *= rule.scale or self.q.shape[2] ** -0.5
        if rule.softcap:
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        far = self.pos[rows, None] - self.pos[None, :]
        seen = far >= 0
        if rule.window:
            seen &= (far < rule.window) | (self.pos[None, :] < rule.sinks)
        top = scores.max(-1, keepdims=True)
        weights = np.where(seen[:, None], np.exp(scores - top), 0)
        total = weights.sum(-1, keepdims=True)
        if rule.sink_logits is not None:
            total = total + np.exp(rule.sink_logits[None, :, None] - top)
        return weights / total

    def sums(self, rule, rows):
        """The weights of rows summed over them and over the query heads of a key head."""
        return self.weights(rule, rows).sum(0).reshape(self.kv_heads, -1, self.n).sum(1)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("n", [1, 40, 700])
def test_sums_are_those_of_the_definition(cache, rule, n):
    text = Text(n + 3)
    text.feed(cache, 0, n, rule)
    wanted = text.sums(rule, np.arange(n))
    np.testing.assert_allclose(cache.weights(), wanted[:, :n], rtol=2e-5, atol=n * 3 * UNIT)
    for row in range(n, n + 3):
        text.feed(cache, row, row + 1, rule, prompt=False)
    np.testing.assert_allclose(
        cache.weights(), text.sums(rule, np.arange(n + 3)), rtol=2e-5, atol=(n + 3) * 3 * UNIT
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prompt", [True, False])
def test_sums_for_every_shape(ops, shape, prompt):
    text, cache = Text(150, *shape), LayerCache(ops, *shape[1:])
    cache.note("cumulative-weights")
    text.feed(cache, 0, 141, RULES[2])
    cache.follow(143)
    text.feed(cache, 141, 150, RULES[2], prompt)
    wanted = text.sums(RULES[2], np.arange(143, 150))
    np.testing.assert_allclose(cache.weights(), wanted, rtol=3e-5, atol=7 * shape[0] * UNIT)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("half", [np.float16, np.float32])
def test_noting_changes_nothing_of_the_output(ops, cache, rule, half):
    text, plain, cache = (
        Text(600),
        LayerCache(ops, KV_HEADS, DIM, dtype=half),
        LayerCache(ops, KV_HEADS, DIM, dtype=half),
    )
    cache.note("cumulative-weights")
    for start, stop, prompt in ((0, 70, True), (70, 590, True), (590, 591, False), (591, 600, False)):
        wanted = text.feed(plain, start, stop, rule, prompt)
        np.testing.assert_array_equal(text.feed(cache, start, stop, rule, prompt), wanted)


@pytest.mark.parametrize("sizes", [(1,), (7,), (64, 1, 130), (300,)])
def test_chunks_leave_the_same_sums_to_the_bit(ops, cache, sizes):
    text, whole = Text(300), LayerCache(ops, KV_HEADS, DIM)
    whole.note("cumulative-weights")
    text.feed(whole, 0, 300, RULES[2])
    start = turn = 0
    while start < 300:
        stop = min(300, start + sizes[turn % len(sizes)])
        text.feed(cache, start, stop, RULES[2])
        start, turn = stop, turn + 1
    np.testing.assert_array_equal(cache.weights(), whole.weights())


def test_threads_leave_the_same_sums_to_the_bit(ops, device):
    text, found = Text(600), []
    for threads in (1, 2, 3):
        table = open_ops(device, threads=threads)
        cache = LayerCache(table, KV_HEADS, DIM)
        cache.note("cumulative-weights")
        text.feed(cache, 0, 590)
        text.feed(cache, 590, 600, prompt=False)
        found.append(cache.weights())
        table.close()
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("kept", range(1, 5))
def test_rejected_drafts_leave_no_trace(ops, cache, kept):
    text, plain = Text(600), LayerCache(ops, KV_HEADS, DIM)
    plain.note("cumulative-weights")
    for one in (cache, plain):
        text.feed(one, 0, 590)
    for row in range(590, 590 + kept):
        text.feed(plain, row, row + 1, prompt=False)
    text.feed(cache, 590, 594, prompt=False)
    assert cache.can_rollback_to(590 + kept)
    cache.rollback(590 + kept)
    np.testing.assert_array_equal(cache.weights(), plain.weights())


def test_rows_are_taken_back_only_while_they_are_apart(cache):
    text = Text(60)
    text.feed(cache, 0, 40)
    assert cache.can_rollback_to(40) and not cache.can_rollback_to(39) and cache.can_rollback_to(0)
    text.feed(cache, 40, 41, prompt=False)
    assert cache.can_rollback_to(41) and cache.can_rollback_to(40) and not cache.can_rollback_to(39)
    cache.rollback(40)
    before = cache.weights()
    text.feed(cache, 40, 42, prompt=False)
    text.feed(cache, 42, 43, prompt=False)
    assert not cache.can_rollback_to(41)
    assert cache.weights()[:, :40].sum() > before.sum()
    cache.rollback(0)
    assert len(cache) == 0 and cache.weights().size == 0


def test_a_cache_that_notes_nothing_goes_back_anywhere_but_before_an_eviction(ops):
    cache, text = LayerCache(ops, KV_HEADS, DIM), Text(60)
    text.feed(cache, 0, 50)
    assert all(cache.can_rollback_to(pos) for pos in range(51))
    cache.keep(np.arange(50))
    assert cache.can_rollback_to(3)
    cache.keep(np.r_[:4, 30:50])
    text.feed(cache, 50, 60)
    assert [pos for pos in range(60) if cache.can_rollback_to(pos)] == [0, *range(50, 60)]
    other = LayerCache(ops, KV_HEADS, DIM)
    other.restore(cache.snapshot())
    assert other.can_rollback_to(60) and not other.can_rollback_to(49)
    cache.rollback(0)
    text.feed(cache, 0, 50)
    assert cache.can_rollback_to(3)


def test_weights_move_with_their_slots(cache):
    text = Text(700)
    text.feed(cache, 0, 600)
    sums = cache.weights()
    slots = np.r_[0:3, 100:105, 590:600]
    cache.keep(slots)
    np.testing.assert_array_equal(cache.weights(), sums[:, slots])
    text.feed(cache, 600, 601, prompt=False)
    assert (cache.weights()[:, :-1] >= sums[:, slots]).all() and (cache.weights()[:, -1] > 0).all()
    cache.rollback(600)
    np.testing.assert_array_equal(cache.weights(), sums[:, slots])
    lists = [np.arange(0, 18, 2), np.arange(4)]
    cache.keep_heads(lists)
    for head, chosen in enumerate(lists):
        np.testing.assert_array_equal(cache.weights()[head, : len(chosen)], sums[head, slots[chosen]])
    assert (cache.weights()[1, 4:] == 0).all()
    text.feed(cache, 601, 602, prompt=False)
    assert cache.weights()[1, 4] > 0 and (cache.weights()[1, 5:] == 0).all()


def test_ragged_heads_get_the_weights_of_their_own_slots(cache):
    text = Text(300)
    text.feed(cache, 0, 299)
    lists = [np.arange(0, 299, 3), np.arange(200, 299)]
    cache.keep_heads(lists)
    cache.follow(299)
    text.feed(cache, 299, 300, prompt=False)
    k = text.k.astype(np.float16).astype(np.float64)
    for head, slots in enumerate(lists):
        there = np.r_[slots, 299]
        scores = text.q[299, 3 * head : 3 * head + 3].astype(np.float64) @ k[there, head].T / 4
        wanted = np.exp(scores - scores.max(-1, keepdims=True))
        wanted = (wanted / wanted.sum(-1, keepdims=True)).sum(0)
        np.testing.assert_allclose(cache.weights()[head, : len(there)], wanted, rtol=2e-5, atol=6 * UNIT)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("since", [0, 570, 588, 599, 600])
def test_only_queries_from_a_position_on_count(cache, since, prompt):
    text = Text(600)
    text.feed(cache, 0, 570)
    cache.follow(since)
    for start in (570, 585):
        text.feed(cache, start, start + 15, prompt=prompt)
    rows = np.arange(max(570, since), 600)
    wanted = text.sums(RULES[0], rows) if len(rows) else np.zeros((KV_HEADS, 600))
    np.testing.assert_allclose(cache.weights(), wanted, rtol=2e-5, atol=90 * UNIT)


def test_windows_count_nothing_before_they_are_asked_to(ops):
    cache, text = LayerCache(ops, KV_HEADS, DIM), Text(40)
    cache.note("window-weights")
    text.feed(cache, 0, 30)
    assert (cache.weights() == 0).all()
    cache.follow(35)
    text.feed(cache, 30, 40)
    np.testing.assert_allclose(cache.weights(), text.sums(RULES[0], np.arange(35, 40)), rtol=2e-5, atol=1e-6)
    cache.rollback(0)
    text.feed(cache, 0, 40)
    assert (cache.weights() == 0).all()


def test_snapshots_have_the_weights(cache, ops):
    text, other = Text(60), LayerCache(ops, KV_HEADS, DIM)
    other.note("cumulative-weights")
    text.feed(cache, 0, 50)
    other.restore(pickle.loads(pickle.dumps(cache.snapshot())))
    for one in (cache, other):
        text.feed(one, 50, 60, prompt=False)
    np.testing.assert_array_equal(cache.weights(), other.weights())
    assert not other.can_rollback_to(49)


def test_bytes_are_counted(ops, cache):
    plain, text = LayerCache(ops, KV_HEADS, DIM), Text(64)
    for one in (plain, cache):
        text.feed(one, 0, 64)
    assert cache.nbytes - plain.nbytes == 64 * (cache.token_bytes - plain.token_bytes) == 64 * 8 * KV_HEADS


def test_a_cache_that_was_not_asked_says_so(ops):
    with pytest.raises(ValueError, match="notes no weights here"):
        LayerCache(ops, KV_HEADS, DIM).weights()


class Watches:
    """Keep what the caches noted at the end of each request."""

    exact = True
    evidence = ("cumulative-weights",)

    def __init__(self):
        self.found = {}

    @hookimpl
    def store_prefix(self, seq):
        self.found[tuple(seq.tokens)] = [cache.weights() for cache in seq.caches]


OTHERS = ([Copies], [Together], [Copies, lambda: Together(rows=5)], [lambda: Together(rows=3)])


@pytest.mark.parametrize("others", OTHERS, ids=["drafts", "together", "both", "small chunks"])
def test_no_step_shows_in_the_sums_of_a_session(others):
    plain, watches = Watches(), Watches()
    assert run(plain) == run()
    session = Session.open(MODEL, [watches, *(other() for other in others)])
    texts = [session.text(prompt, max_tokens=32, temp=0.0) for prompt in (PROMPT, "abc", PROMPT)]
    for text in texts:
        "".join(text)
    ((tokens, wanted),) = plain.found.items()
    found = watches.found[tokens]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plan_without_evidence_notes_nothing():
    session = Session.open(MODEL)
    assert session.plan.evidence == frozenset() and all(make().noted is None for make in session.plan.caches)
    session = Session.open(MODEL, [Watches()])
    assert session.plan.memory.kv_token == sum(make().token_bytes for make in session.plan.caches)
    assert answer(session) == run()


def test_what_cannot_note_is_refused_by_name():
    class Own(LayerCache):
        def attend(self, q, q_pos, rule, out, prompt):
            out[:] = 0

    class Fused:
        @hookimpl
        def kv_cache(self, model, layer):
            return Own.factory(model, layer) if layer == 1 else None

    class Attends:
        @hookimpl
        def attention(self, layer):
            return (lambda q: q * 0) if layer == 2 else None

    class Windows(Watches):
        evidence = ("window-weights",)

    for other, why in (
        (Fused, r"the cache of layer 1 \(fused\)"),
        (Attends, r"the attention of layer 2 \(attends\)"),
    ):
        with pytest.raises(
            PluginError, match=f"watches needs cumulative-weights from attention, and {why} does not"
        ):
            Session.open(MODEL, [Watches(), other()])
    with pytest.raises(PluginError, match=r"watches \(cumulative-weights\) and windows \(window-weights\)"):
        Session.open(MODEL, [Watches(), Windows()])
