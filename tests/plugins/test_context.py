"""context: what each policy does at the end of the context, and that a shift keeps every distance."""

import numpy as np
import pytest
from tests.models import Recipe
from tests.small_context import TEXT, answers, opener, rows
from tests.toy import MODEL, Copies, Preempts, Together, answer

from cmr import LayerCache, PluginError, RequestError, Session, hookimpl
from cmr.testing import check

CONTEXT, KEEP = 64, 4
SHIFT = f"context:policy=shift,keep={KEEP}"
PROMPTS = ([1, 2, 3], TEXT[:40], TEXT[50:112])


@pytest.fixture(scope="module")
def models(tmp_path_factory, device):
    with opener(tmp_path_factory.mktemp("context"), device, CONTEXT) as opened:
        yield opened


@pytest.fixture
def llama(models):
    return models("llama")


SINGLE = {
    "norm": Recipe(layers=1),
    "neox": Recipe(arch="qwen2", layers=1, biases=("attn_q", "attn_k", "attn_v")),
    "part": Recipe(arch="stablelm", layers=1, biases=("attn_norm", "output_norm"), meta={"rope.dimension_count": 4}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("drop", [0.5, 0.3])
def test_one_layer_after_a_shift_is_that_of_the_text_left(models, kind, drop):
    """Keys and values of one layer depend on the token alone, so what is left must act like a text of its own."""
    model = models(kind, SINGLE[kind])
    session = Session.open(model, [f"{SHIFT},drop={drop}"])
    dropped = int(drop * (CONTEXT - KEEP))
    end = CONTEXT + 3 * dropped + 7
    found = rows(session, TEXT[: end + 1], 10)[-1]
    assert session.report()["context"]["shifts"] == 4
    left = [*TEXT[:KEEP], *TEXT[KEEP + 4 * dropped : end]]
    wanted = rows(Session.open(model), [*left, 0], 5)[-1]
    unturned = rows(Session.open(model, [Evicts(dropped)]), TEXT[: end + 1], 10)[-1]
    error, other = (np.abs(row - wanted).max() for row in (found, unturned))
    assert error < 0.02 * np.abs(wanted).max()
    assert error < 0.5 * other


class Evicts:
    """What a shift does but for the turning."""

    def __init__(self, dropped):
        self.dropped = dropped

    @hookimpl(wrapper=True)
    def scheduler(self):
        self.inner = yield
        return self

    def add(self, seq):
        seq.limit = seq.n_prompt + seq.request.max_tokens
        self.inner.add(seq)

    def remove(self, seq):
        self.inner.remove(seq)

    def pick(self):
        return [(seq, 1 if seq.cached >= 10 else 10) for seq, _ in self.inner.pick()]

    @hookimpl
    def on_step(self, step):
        for part in step.parts:
            for cache in part.seq.caches:
                if len(cache) == CONTEXT:
                    cache.keep(np.r_[:KEEP, KEEP + self.dropped : CONTEXT])


def test_nothing_changes_before_the_context_is_full(llama):
    plain = rows(Session.open(llama), TEXT[:CONTEXT], 10)
    np.testing.assert_array_equal(rows(Session.open(llama, [SHIFT]), TEXT[:CONTEXT], 10), plain)


class Held:
    """Keep the positions held after each step."""

    exact = True

    def __init__(self):
        self.seen = []

    @hookimpl
    def on_step(self, step):
        self.seen += [
            (part.seq.cached, [c.positions.tolist() for c in part.seq.caches]) for part in step.parts
        ]


def test_no_more_than_the_context_is_held_and_positions_have_no_gap(llama):
    held = Held()
    session = Session.open(llama, [SHIFT, held])
    assert len(answer(session, TEXT[:20], 200, ignore_eos=True)) == 200
    for cached, layers in held.seen:
        for positions in layers:
            assert len(positions) <= CONTEXT and positions[-1] == cached - 1
            assert (np.diff(positions) == 1).all()
    assert session.report()["context"]["shifts"] == 6


def test_no_chunk_batch_draft_or_preemption_shows(llama):
    alone = answers(Session.open(llama, [SHIFT]), PROMPTS, 120)
    assert all(len(tokens) == 120 for tokens in alone)
    for others in ([], [Copies()], [Together(rows=5)], [Preempts()], [Copies(), Preempts(rows=3)], ["spec-lookup"],
                   ["batching:tokens=20"], ["prefix-cache:block=8"]):  # fmt: skip
        session = Session.open(llama, [SHIFT, *others], chunk=7)
        assert answers(session, PROMPTS, 120) == alone, others
        assert answers(session, PROMPTS, 120) == alone, others
    assert Session.open(llama, [SHIFT, "layer-stream:budget=95%"]) is not None


def test_an_answer_ends_where_it_should(llama):
    session = Session.open(llama, [SHIFT])
    seq = session.add(session.request(TEXT[:5], max_tokens=100, temp=0.0, ignore_eos=True))
    while session.step():
        pass
    assert (seq.n_new, seq.stop) == (100, "length")
    plain = Session.open(llama, ["context:policy=error"])
    seq = plain.add(plain.request(TEXT[:5], max_tokens=100, temp=0.0, ignore_eos=True))
    while plain.step():
        pass
    assert (len(seq.tokens), seq.stop) == (CONTEXT, "context")


def test_error_is_what_happens_without_the_plugin(llama):
    for plugins in ([], ["context"]):
        with pytest.raises(RequestError, match="the prompt has 100 tokens and the context holds 64"):
            answer(Session.open(llama, plugins), TEXT[:100], 4)


@pytest.mark.parametrize(
    ("options", "max_tokens", "left"),
    [("keep=4", 10, 54), ("keep=0", 10, 54), ("room=20", None, 44), ("", None, 48)],
)
def test_truncate_takes_the_middle_out(llama, options, max_tokens, left):
    session = Session.open(llama, [f"context:policy=truncate,{options}".rstrip(",")])
    seq = session.add(session.request(TEXT[:100], max_tokens=max_tokens, temp=0.0, ignore_eos=True))
    keep = 0 if options == "keep=0" else 4
    assert seq.tokens == [*TEXT[:keep], *TEXT[100 - left + keep : 100]]
    while session.step():
        pass
    assert seq.error is None and len(seq.tokens) == CONTEXT
    assert session.report()["context"]["removed"] == 100 - left
    short = session.add(session.request(TEXT[:20], max_tokens=3, temp=0.0))
    assert short.tokens == TEXT[:20]


class Stores:
    """A plugin with caches of its own."""

    @hookimpl
    def kv_cache(self, model, layer):
        return type("Own", (LayerCache,), {}).factory(model, layer)


@pytest.mark.parametrize(
    ("plugins", "why"),
    [
        (["context:policy=shift,keep=40"], "context: keep is 40; it is less than half the context of 64"),
        (["context:drop=1"], "drop lies between 0 and 1"),
        (["context:policy=shift", "kv-evict:budget=48,every=4"], "context:policy=shift and kv-evict both evict"),
        (["context:policy=shift", "attn-window:window=32"], "moves the first positions, which attn-window looks at"),
        (["context:policy=shift", Stores()], "shift turns plain keys, and those of layer 0 are stores's"),
    ],
)  # fmt: skip
def test_refusals_are_polite(llama, plugins, why):
    with pytest.raises(PluginError, match=why):
        Session.open(llama, plugins)


def test_a_model_that_tells_no_rotation_is_not_shifted():
    with pytest.raises(PluginError, match="needs attention that depends on distances alone"):
        Session.open(MODEL, [SHIFT])


@pytest.mark.parametrize("policy", ["error", "truncate"])
def test_it_keeps_the_contracts(policy):
    assert [finding for finding in check(f"context:policy={policy}") if not finding.holds] == []


def test_a_conversation_goes_on_after_a_shift_was_not_needed(llama):
    session = Session.open(llama, [SHIFT])
    first = session.add(session.request(TEXT[:30], max_tokens=10, temp=0.0, ignore_eos=True))
    while session.step():
        pass
    prompt = [*first.tokens, *TEXT[30:40]]
    go_on = session.request(prompt, max_tokens=80, temp=0.0, ignore_eos=True, after=first)
    assert len(list(session.generate(go_on))) == 80
