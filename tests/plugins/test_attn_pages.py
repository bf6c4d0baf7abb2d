"""attn-pages: full attention where all pages fit, chosen pages beyond, the same in chunks, batches and drafts."""

import numpy as np
import pytest
from tests.beside import BESIDE, STORY, alone, answer, beside, tiny
from tests.toy import run

import cmr
from cmr.eval import divergence_at_depth
from cmr.testing import ToyModel, check
from cmr_plugins.attn_pages import AttnPages, PageCache

LONG = (STORY * 6, STORY * 2 + "The cat " * 60)
SMALL = "attn-pages:top=3,size=16,recent=2,first=1"
TOY = ToyModel()


def test_tokens_are_the_plain_runs_while_all_pages_fit():
    assert alone(["attn-pages:top=64"], LONG) == alone([], LONG)
    assert alone([SMALL], LONG) != alone([], LONG)


@pytest.mark.parametrize("other", BESIDE)
def test_beside(other):
    assert beside(other, [SMALL], LONG) == alone([SMALL], LONG)


def test_steps_are_run_again_between_whole_pages(monkeypatch):
    """Recorded steps leave Python's attend out, and give the same tokens as steps that are not recorded."""
    calls, attend = [], PageCache.attend

    def counted(self, *args):
        calls.append(len(self))
        attend(self, *args)

    monkeypatch.setattr(PageCache, "attend", counted)
    found = alone([SMALL], LONG[:1])
    recorded = len(calls)
    monkeypatch.setattr(PageCache, "replayable", False)
    assert alone([SMALL], LONG[:1]) == found
    assert recorded < (len(calls) - recorded) / 2


def test_a_rollback_over_whole_pages_lets_no_recorded_step_run():
    made = cache()
    filled(made, 300)
    attended(made)
    before = made.generation
    made.rollback(295)
    assert made.generation == before
    made.rollback(280)
    assert made.generation != before


def test_more_pages_are_closer_and_chosen_pages_beat_the_newest():
    tokens = tiny().tokenizer.encode(STORY * 8, bos=True)

    def kl(plugin):
        return divergence_at_depth(tiny(), [f"{plugin},size=16"], tokens, 512, 48).divergence.mean

    few, many = kl("attn-pages:top=4,recent=2,first=0"), kl("attn-pages:top=16,recent=2,first=0")
    newest = kl("attn-pages:top=0,recent=18,first=0")
    assert many < few and 2 * many < newest


def cache(**options):
    model = ToyModel(heads=4, kv_heads=2, dim=64)
    options = {"first": 1, "last": 2, "top": 3, "size": 16} | options
    return PageCache.factory(model, 0, **options)()


def filled(made, n, seed=0):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, n, 2, 16)).astype(np.float32)
    made.append(k, v, np.arange(n, dtype=np.int32))
    return k, v


def attended(made, n=1, seed=1):
    q = np.random.default_rng(seed).standard_normal((n, 4, 16)).astype(np.float32)
    out = np.empty_like(q)
    made.attend(q, made.positions[-n:], cmr.AttnRule(), out, False)
    return out


@pytest.mark.parametrize("change", ["rollback", "keep", "restore", "clear"])
def test_edges_follow_what_happens_to_slots(change):
    made = cache()
    filled(made, 300)
    attended(made)
    if change == "rollback":
        made.rollback(200)
    elif change == "keep":
        made.keep(np.r_[:40, 100:290])
    elif change == "restore":
        other = cache()
        filled(other, 250, seed=5)
        made.restore(other.snapshot())
    else:
        made.clear()
        filled(made, 280, seed=7)
    fresh = cache()
    k, v, pos = made.view()
    fresh.append(k, v, pos)
    assert np.array_equal(attended(made), attended(fresh))
    rng = np.random.default_rng(3)
    for which in (made, fresh):
        rng = np.random.default_rng(3)
        which.append(
            *rng.standard_normal((2, 60, 2, 16)).astype(np.float32), np.arange(400, 460, dtype=np.int32)
        )
    assert np.array_equal(attended(made, 5), attended(fresh, 5))


def test_heads_that_differ_attend_to_everything():
    made, plain = cache(), cmr.LayerCache.factory(ToyModel(heads=4, kv_heads=2, dim=64), 0)()
    for which in (made, plain):
        filled(which, 300)
        which.keep_heads([range(0, 300, 2), range(290)])
    q = np.ones((1, 4, 16), np.float32)
    outs = []
    for which in (made, plain):
        outs.append(np.empty_like(q))
        which.attend(q, np.array([299], np.int32), cmr.AttnRule(), outs[-1], False)
    assert np.array_equal(*outs)


def test_edges_count_as_memory():
    made = cache()
    filled(made, 600)
    before = made.nbytes
    attended(made)
    assert made.nbytes - before == made.edges.nbytes > 0


def test_layers_left_alone_are_plain():
    plan = cmr.Session.open(tiny(), ["attn-pages:first=4"]).plan
    assert plan.owners["kv_cache"] == ("built in",) * 4 + ("attn-pages",) * 2
    assert run("attn-pages:first=9", model=TOY) == run(model=TOY)


def test_another_cache_is_refused_by_name():
    class Other:
        @cmr.hookimpl
        def kv_cache(self, model, layer):
            return cmr.LayerCache.factory(model, layer)

    with pytest.raises(cmr.PluginError, match="attn-pages and other both provide kv_cache"):
        cmr.Session.open(TOY, ["attn-pages", Other()])


@pytest.mark.parametrize("options", ["size=24", "top=-1", "recent=0"])
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(cmr.PluginError, match="attn-pages"):
        cmr.Session.open(TOY, [f"attn-pages:{options}"])


def test_an_answer_after_another_is_that_of_the_whole_text():
    session = cmr.Session.open(tiny(), [SMALL])
    first = session.text(STORY * 5, max_tokens=40, temp=0.0, ignore_eos=True)
    list(first)
    cut = first.seq.tokens[: first.seq.n_prompt - 50]
    again = list(session.generate(session.request(cut, max_tokens=12, temp=0.0, after=first.seq)))
    assert again == answer(cmr.Session.open(tiny(), [SMALL]), cut, max_tokens=12, ignore_eos=False)


def test_contracts():
    found = check(lambda: AttnPages(first=0))
    assert [finding for finding in found if not finding.holds] == []


def test_a_needle_is_found_that_a_window_of_the_same_size_misses():
    rng, n, hits = np.random.default_rng(2), 2000, []
    for place in (70, 700, 1500):
        made = cache(first=1, last=2, top=3)
        k, v = rng.standard_normal((2, n, 2, 16)).astype(np.float32)
        q = rng.standard_normal((1, 4, 16)).astype(np.float32)
        for head in range(2):
            q[0, 2 * head + 1] = q[0, 2 * head]  # the group asks for the same thing
            k[place, head] = 3 * q[0, 2 * head]
        made.append(k, v, np.arange(n, dtype=np.int32))
        out = [np.empty_like(q) for _ in range(3)]
        rules = (cmr.AttnRule(), cmr.AttnRule(window=96))
        made.attend(q, np.array([n - 1], np.int32), rules[0], out[0], False)
        for rule, found in zip(rules, out[1:]):
            made.ops.attend(q, np.array([n - 1], np.int32), made.segments(), rule, found, False)
        hits.append([np.abs(found - out[1]).max() for found in (out[0], out[2])])
    chosen, window = np.array(hits).T
    assert (chosen < 0.3).all() and (window > 0.5).all()
