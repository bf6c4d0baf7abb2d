"""context:policy=page: what each row attends to, what is recalled, that nothing else shows, and failing disks."""

import errno
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from tests.models import RECIPES, Recipe, write_model
from tests.planted import ASK, Pairs, write_recaller
from tests.small_context import TEXT, answers, opener, rows
from tests.toy import MODEL, Copies, Preempts, Together, answer

from cmr import AttnRule, DiskSpace, PluginError, Session, hookimpl, open_model
from cmr.eval import Following
from cmr.ops import open_ops
from cmr.testing.laws import attention
from cmr_plugins.context import Context
from cmr_plugins.context.pages import RUN, PagedCache

CONTEXT = 160
PAGE = "context:policy=page,size=16,top=2"
PROMPTS = ([1, 2, 3], TEXT[:100], TEXT[50:209], TEXT[100:480])  # the last is longer than the context


@pytest.fixture(scope="module")
def models(tmp_path_factory, device):
    with opener(tmp_path_factory.mktemp("page"), device, CONTEXT) as opened:
        yield opened


@pytest.fixture
def llama(models):
    return models("untied", Recipe())


def test_nothing_changes_before_the_context_is_full(llama):
    plain = rows(Session.open(llama), TEXT[:CONTEXT], 10)
    np.testing.assert_array_equal(rows(Session.open(llama, [PAGE]), TEXT[:CONTEXT], 10), plain)


class All(Context):
    """The plugin, but every page is retrieved, which takes more memory than the context."""

    @hookimpl
    def kv_cache(self, model, layer):
        make = super().kv_cache(model, layer)
        return make and partial(make, top=40)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "granite-unrotated", "one-kv-head"])
@pytest.mark.parametrize("n_prompt", [10, 250])
def test_with_all_pages_at_their_own_positions_it_is_full_attention(models, name, n_prompt):
    """The smaller context only says how much is in memory; every token is still seen where it was."""
    session = Session.open(models(name), [All(policy="page", size=16, top=2, positions="own")])
    found = rows(session, TEXT[:400], n_prompt)
    plain = rows(Session.open(models(name, context=512)), TEXT[:400], n_prompt)
    assert session.report()["all"]["paged_out"] >= 200
    error = np.abs(found - plain).max(1) / np.abs(plain).max()
    assert np.median(error) < 1e-3 and error.max() < 0.02


def paged(ops, n, out, top, rope, sinks=3, size=16):
    """A cache of n random rows of which `out` went to disk, and the rows."""
    rng = np.random.default_rng(5)
    k, v = rng.standard_normal((2, n, 2, 32), np.float32)
    cache = PagedCache(ops, 2, 32, sinks=sinks, top=top, size=size, rope=rope, space=DiskSpace())
    cache.append(k, v, np.arange(n, dtype=np.int32))
    cache.page_out(out)
    return cache, k.astype(np.float16).astype(np.float32), v.astype(np.float16).astype(np.float32)


def rotate(x, by, inv_freq):
    """Rotate pairs side by side, x [n, heads, dim] by [n] positions: an independent reference, as complex numbers."""
    pairs = x.astype(np.float64).view(np.complex128)
    angle = np.multiply.outer(np.broadcast_to(by, len(x)), inv_freq)[:, None]
    return (pairs * np.exp(1j * angle)).view(np.float64)


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("device", ["portable", "cpu"])
def test_a_row_attends_to_sinks_its_best_pages_and_the_window(device, near):
    inv_freq = 100.0 ** -(np.arange(16) / 16)
    n, out, sinks, size, top = 200, 128, 3, 16, 3
    ops = open_ops(device, threads=2)
    cache, k, v = paged(ops, n, out, top, (inv_freq, "norm") if near else None)
    assert cache.positions.tolist() == list(range(sinks + out, n))
    q, q_pos = np.random.default_rng(6).standard_normal((4, 4, 32)).astype(np.float32), np.arange(n - 4, n)
    found = np.full(q.shape, np.nan, np.float32)
    cache.attend(q, q_pos.astype(np.int32), AttnRule(), found, False)
    old = np.arange(sinks, sinks + out)
    for row, p in enumerate(q_pos):
        for head in range(2):
            heads, there = slice(2 * head, 2 * head + 2), k[:, head : head + 1].copy()
            far_q = q[row : row + 1, heads]
            if near:  # the page stands right behind the sinks, the window right behind it
                there[old] = rotate(there[old], sinks - old, inv_freq)
                far_q = rotate(far_q, sinks + 1 - (sinks + out), inv_freq)
            means = there[old, 0].reshape(-1, RUN, 32).mean(1)
            scores = (far_q[0] @ means.T).reshape(2, -1, size // RUN).max(2)
            best = np.sort(np.argsort(-(scores - scores.max(1, keepdims=True)).max(0))[:top])
            far = np.r_[:sinks, (sinks + best[:, None] * size + np.arange(size)).ravel()]
            window = np.arange(sinks + out, p + 1)
            # One softmax over two sets of keys, each with queries of its own: shift the scores into one set.
            both = np.concatenate(
                [far_q[0] @ there[far, 0].T, q[row, heads] @ k[window, head].T], 1
            ) / np.sqrt(32)
            weights = np.exp(both - both.max(1, keepdims=True))
            wanted = weights @ v[np.r_[far, window], head] / weights.sum(1, keepdims=True)
            np.testing.assert_allclose(found[row, heads], wanted, atol=2e-3)
    ops.close()


def test_with_every_page_at_its_own_position_a_row_is_the_attention_of_all():
    ops = open_ops("cpu", threads=1)
    cache, k, v = paged(ops, 200, 128, 8, None)
    q, q_pos = np.random.default_rng(6).standard_normal((4, 4, 32)).astype(np.float32), np.arange(196, 200)
    for prompt in (False, True):
        found = np.zeros(q.shape, np.float32)
        cache.attend(q, q_pos.astype(np.int32), AttnRule(), found, prompt)
        np.testing.assert_allclose(found, attention(q, k, v, q_pos, np.arange(200), AttnRule()), atol=1e-5)
    ops.close()


def test_a_snapshot_holds_the_pages_and_rollback_ends_where_they_began():
    ops = open_ops("cpu", threads=1)
    cache, _, _ = paged(ops, 200, 96, 2, None)
    other = PagedCache(ops, 2, 32, sinks=3, top=2, size=16, rope=None, space=DiskSpace())
    other.restore(cache.snapshot())
    assert not cache.can_rollback_to(150) and other.can_rollback_to(200) and not other.can_rollback_to(199)
    q, pos, outs = np.ones((1, 4, 32), np.float32), np.array([199], np.int32), []
    for one in (cache, other):
        outs.append(np.zeros((1, 4, 32), np.float32))
        one.attend(q, pos, AttnRule(), outs[-1], False)
    np.testing.assert_array_equal(*outs)
    used = cache.space.used
    cache.rollback(0)
    assert len(cache) == cache.nbytes == 0 and cache.space.used == 0 < used
    cache.append(
        np.ones((5, 2, 32), np.float32), np.ones((5, 2, 32), np.float32), np.arange(5, dtype=np.int32)
    )
    assert cache.replayable and len(cache.segments()) == 1
    ops.close()


@pytest.fixture(scope="module")
def alone(models):
    return answers(Session.open(models("untied", Recipe()), [PAGE]), PROMPTS, 200)


OTHERS = (
    *([], [Copies], [Together], [Preempts], [Copies, Preempts]),
    *(["spec-lookup:gain=0"], ["batching:tokens=20"], ["prefix-cache:block=8"]),
)


@pytest.mark.parametrize("others", OTHERS, ids=str)
def test_no_chunk_batch_draft_or_preemption_shows(llama, alone, others):
    session = Session.open(
        llama, [PAGE, *(one if isinstance(one, str) else one() for one in others)], chunk=7
    )
    assert answers(session, PROMPTS, 200) == alone
    assert answers(session, PROMPTS, 200) == alone


def test_pages_change_what_is_said(llama, alone):
    shifted = answers(Session.open(llama, ["context:policy=shift"]), PROMPTS, 200)
    for ours, theirs, prompt in zip(alone, shifted, PROMPTS):
        same = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
        assert len(prompt) + same >= CONTEXT


def test_streamed_layers_give_the_same_tokens(tmp_path, device, monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream.SAMPLE_SECONDS", 0.01)
    recipe = Recipe(layers=9, type="Q8_0", inner=256, dim=32, dim_v=32, context=1024)
    model = open_model(write_model(tmp_path / "model.gguf", recipe), device=device, context=CONTEXT)
    plain = answers(Session.open(model, [PAGE]), PROMPTS, 60)
    streamed = Session.open(model, [PAGE, f"layer-stream:budget={int(0.7 * model.file.nbytes)}"])
    assert answers(streamed, PROMPTS, 60) == plain
    model.close()


class Held:
    """Keep the slots in memory, and what is on disk, after each step."""

    exact = True

    def __init__(self):
        self.seen = []

    @hookimpl
    def on_step(self, step):
        for cache in (cache for part in step.parts for cache in part.seq.caches):
            far = cache.held[0].shape[1] if cache.held else 0
            self.seen.append((len(cache) + far, cache.nbytes, cache.space.used))


def test_memory_is_that_of_the_context_and_nothing_is_left(llama, tmp_path):
    held = Held()
    session = Session.open(llama, [f"{PAGE},dir={tmp_path}", held])
    assert len(answer(session, TEXT[:50], 600, ignore_eos=True)) == 600
    slots, sizes, disk = np.array(held.seen).T
    assert slots.max() <= CONTEXT and disk.max() > 0
    plain = CONTEXT * session.plan.caches[0]().token_bytes
    means = 650 // RUN * 2 * 16 * 4
    spare = 64 * session.plan.caches[0]().token_bytes  # caches grow by blocks
    assert sizes.max() < plain + spare + 2 * means + 4 * 650  # positions of what is on disk
    assert session.report()["context"]["disk_bytes"] == 0 and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def recaller(tmp_path_factory):
    model = open_model(
        write_recaller(tmp_path_factory.mktemp("recaller") / "model.gguf"), threads=1, context=512
    )
    yield model
    model.close()


def recalled(model, plugin, n_prompt):
    """The share of keys whose values are known at the end of a text four times as long as the context."""
    pairs, right = Pairs(2000, 64, 24, False, 1), 0
    text, known = [*pairs.tokens, 1, *pairs.asking()], dict(pairs.questions)
    with closing(Following(Session.open(model, [plugin]), text, n_prompt)) as following:
        for _ in range(n_prompt, len(pairs.tokens) + 1):
            following.next_row()
        for token in text[len(pairs.tokens) : -1]:
            row = following.next_row()
            right += token >= ASK and int(row.argmax()) == known[token - ASK]
    return right / len(known)


def test_what_was_paged_out_is_recalled(recaller):
    assert recalled(recaller, "context:policy=shift", 300) < 0.3
    for options, n_prompt in (
        ("top=8", 300),
        ("top=8", 1500),
        ("top=4,size=64", 300),
        ("top=8,positions=own", 300),
    ):
        assert recalled(recaller, f"context:policy=page,{options}", n_prompt) > 0.8, options


def test_a_full_disk_ends_the_text_it_concerns_and_says_so(llama, monkeypatch):
    session = Session.open(llama, [PAGE, Together()])
    short, long = (
        session.add(session.request(TEXT[:n], max_tokens=40, temp=0.0, ignore_eos=True)) for n in (50, 140)
    )

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    while session.step():
        pass
    assert short.error is None and short.n_new == 40
    assert str(long.error).startswith("context: ") and "No space left on device" in str(long.error)
    assert "\n" not in str(long.error) and isinstance(long.error, PluginError)


def test_the_limit_on_disk_holds(llama):
    session = Session.open(llama, [f"{PAGE},most=50kB"])
    with pytest.raises(PluginError, match="context: .* over the limit of 50000"):
        answer(session, TEXT[:50], 600, ignore_eos=True)


@pytest.mark.parametrize(
    ("plugins", "why"),
    [
        (["context:policy=page"], "top=16 pages of 32 leave a window of -356 of the context of 160"),
        (["context:size=20"], "size is 16, 32, 64, not 20"),
        (["context:top=0"], "top 1 or more"),
        ([PAGE, "kv-evict:policy=recent,budget=48,every=4"], "context:policy=page and kv-evict both evict"),
        ([PAGE, "attn-window:window=32"], "moves the first positions, which attn-window looks at"),
        ([PAGE, "attn-pages"], "attn-pages and context both provide kv_cache|context and attn-pages both"),
        ([PAGE, "kv-quant"], "kv-quant and context both provide kv_cache|context and kv-quant both"),
        ([PAGE, "kv-tiers"], "kv-tiers and context both provide kv_cache|context and kv-tiers both"),
    ],
)  # fmt: skip
def test_refusals_are_polite(llama, plugins, why):
    with pytest.raises(PluginError, match=why):
        Session.open(llama, plugins)


def test_a_model_with_windows_needs_room_for_them(models):
    wide = Recipe(
        arch="gemma3",
        layers=3,
        norms=RECIPES["gemma3"].norms,
        head_norms="one",
        meta={"attention.sliding_window": 120},
    )
    with pytest.raises(PluginError, match="120 stay at least"):
        Session.open(models("wide", wide), [PAGE])


def test_a_model_that_tells_no_rotation_is_refused():
    with pytest.raises(PluginError, match="both|needs attention that depends on distances alone|has no"):
        Session.open(MODEL, [PAGE])


def test_a_conversation_goes_on_behind_the_context(llama):
    session = Session.open(llama, [PAGE])
    first = session.add(session.request(TEXT[:30], max_tokens=300, temp=0.0, ignore_eos=True))
    while session.step():
        pass
    prompt = [*first.tokens, *TEXT[30:40]]
    go_on = session.add(session.request(prompt, max_tokens=80, temp=0.0, ignore_eos=True, after=first))
    session.step()
    assert go_on.cached > 300 and go_on.borders[0] == 30
    while session.step():
        pass
    assert go_on.error is None and go_on.n_new == 80
