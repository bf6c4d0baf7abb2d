"""Every hook, seen from a plugin: when it is called, with what, and what its answer does."""

import inspect

import numpy as np
import pytest
from tests.toy import MODEL, PROMPT, Copies, Drafts, Repeats, Sees, Together, answer, run

from cmr import AttnRule, LayerCache, PluginError, Session, hookimpl, hookspecs
from cmr.discovery import load
from cmr.resolve import resolve

PLAIN = run()
HOOKS = hookspecs.HOOKS


def test_every_hook_is_listed_in_running_order_and_says_in_a_sentence_what_it_is_for():
    assert list(HOOKS) == [name for name, thing in vars(hookspecs).items() if hasattr(thing, "cmr_spec")]
    for name in HOOKS:
        text = inspect.getdoc(getattr(hookspecs, name))
        assert text.count("\n") == 0 and text.endswith("."), name


def test_every_hook_has_a_test(request):
    source = request.path.read_text() + (request.path.parents[1] / "toy.py").read_text()
    assert [name for name in HOOKS if f"def {name}(" not in source] == []


# -- plan --


def test_weight_source_serves_the_layers():
    class Counts:
        exact = True

        @hookimpl
        def weight_source(self, model):
            self.inner, self.held, self.most = model.weights, 0, 0
            return self

        def acquire(self, layer):
            self.held += 1
            self.most = max(self.most, self.held)
            return self.inner.acquire(layer)

        def release(self, layer):
            self.held -= 1

    source = Counts()
    assert run(source) == PLAIN
    assert (source.held, source.most) == (0, 1)


def test_layer_order_leaves_layers_out():
    class Skip:
        @hookimpl
        def layer_order(self, model):
            return [i for i in range(model.n_layers) if i != 1]

    session = Session.open(MODEL, [Skip()])
    assert session.plan.layers == (0, 2)
    assert answer(session) != PLAIN


def test_kv_cache_makes_the_caches():
    class Rounded(LayerCache):
        def encode(self, x, keys):
            return (np.round(x * 4) / 4,)

    class Coarse:
        @hookimpl
        def kv_cache(self, model, layer):
            return Rounded.factory(model, layer) if layer else None

    session = Session.open(MODEL, [Coarse()])
    assert session.plan.owners["kv_cache"] == ("built in", "coarse", "coarse")
    assert answer(session) != PLAIN


def test_a_cache_of_floats_gives_other_bits_and_the_same_size_of_numbers():
    class Floats:
        @hookimpl
        def kv_cache(self, model, layer):
            return LayerCache.factory(model, layer, dtype=np.float32)

    assert len(run(Floats())) == len(PLAIN)


@pytest.mark.parametrize("wide", [AttnRule(window=10_000), AttnRule(window=7, sinks=10_000)])
def test_attention_may_be_a_rule(wide):
    class Rule:
        def __init__(self, rule):
            self.rule = rule

        @hookimpl
        def attention(self):
            return self.rule

    assert run(Rule(wide)) == PLAIN
    assert run(Rule(AttnRule(window=3))) != PLAIN


def test_attention_may_be_a_function_that_writes_or_returns():
    rule = MODEL.rule(0)

    class Writes:
        @hookimpl
        def attention(self, model, layer):
            return lambda q, cache, q_pos, out, prompt: cache.attend(q, q_pos, rule, out, prompt)

    class Returns:
        @hookimpl
        def attention(self):
            return self.attend

        def attend(self, cache, q, q_pos):
            out = np.empty_like(q)
            cache.attend(q, q_pos, rule, out, False)
            return out

    assert run(Writes()) == run(Returns()) == PLAIN


def test_a_drafter_only_proposes():
    drafters = [
        Copies(),
        Drafts(lambda seq: PLAIN[seq.n_new :]),
        Drafts(lambda seq: np.array([1, 2, 3])),
        Drafts(lambda seq: [PLAIN[seq.n_new], 5] if seq.n_new < 31 else []),
        Drafts(lambda seq: []),
    ]
    for drafter in drafters:
        assert run(drafter) == PLAIN
    session = Session.open(MODEL, [drafters[1]])
    assert answer(session) == PLAIN
    figures = session.report()
    assert figures["steps"] == 2 and figures["accepted"] == figures["drafted"] == 30


def test_sampled_tokens_do_not_depend_on_the_draft_either():
    for options in ({"temp": 1.0, "seed": 3}, {"temp": 1.0, "seed": 4, "mirostat": 2}):
        plain = run(**options)
        assert run(Copies(), **options) == plain
        assert run(Drafts(lambda seq, said=plain: said[seq.n_new : seq.n_new + 4]), **options) == plain


def test_a_scheduler_advances_many():
    session = Session.open(MODEL, [Together(rows=5)])
    prompts = [PROMPT[:n] for n in (3, 11, 30, len(PROMPT))]
    requests = [session.request(prompt, max_tokens=12, temp=0.0) for prompt in prompts]
    got = {id(request): [] for request in requests}
    for request, token in session.stream(requests):
        got[id(request)].append(token)
    assert [got[id(request)] for request in requests] == [run(prompt=p, max_tokens=12) for p in prompts]


# -- pre and post --


def test_the_hooks_of_a_request_come_once_and_in_order():
    seen = []

    class Follows:
        @hookimpl
        def start_session(self, session):
            seen.append(("start_session", session.plan.exact))

        @hookimpl
        def prepare_request(self, request):
            seen.append(("prepare_request", len(request.tokens)))

        @hookimpl
        def answer_request(self, request):
            seen.append(("answer_request",))

        @hookimpl
        def restore_prefix(self, seq):
            seen.append(("restore_prefix", len(seq.caches), len(seq.caches[0])))

        @hookimpl
        def store_prefix(self, seq):
            seen.append(("store_prefix", seq.cached, len(seq.caches[0]), seq.stop))

        @hookimpl
        def finish_request(self, request, tokens, reason):
            seen.append(("finish_request", tokens, reason))

        @hookimpl
        def report(self, session):
            return {"seen": len(seen)}

    session = Session.open(MODEL, [Follows()])
    tokens = answer(session, "abc", max_tokens=3)
    assert seen == [
        ("start_session", False),
        ("prepare_request", 3),
        ("answer_request",),
        ("restore_prefix", 3, 0),
        ("store_prefix", 5, 5, "length"),
        ("finish_request", tokens, "length"),
    ]
    assert session.report()["follows"] == {"seen": 6}


def test_prepare_request_edits_the_tokens_and_leaves_the_prompt():
    class Tail:
        exact = False

        @hookimpl
        def prepare_request(self, request):
            del request.tokens[:-4]

    session = Session.open(MODEL, [Tail()])
    request = session.request(PROMPT, max_tokens=8, temp=0.0)
    for _ in range(2):
        assert list(session.generate(request)) == run(prompt=PROMPT[-4:], max_tokens=8)
    assert request.prompt == PROMPT


def test_answer_request_leaves_the_model_out():
    class Answers:
        @hookimpl
        def answer_request(self, request):
            return np.array([1, 2, 3]) if len(request.tokens) == 3 else None

    session = Session.open(MODEL, [Answers()])
    assert answer(session, "abc") == [1, 2, 3]
    assert session.report()["steps"] == 0
    text = session.text("abc")
    assert "".join(text) == '!"#' and text.stop == "answered"
    assert "".join(session.text("abc", stop="#")) == '!"'
    assert answer(session) == PLAIN


def test_a_stored_prefix_is_used_again():
    class Keeps:
        exact = True

        def __init__(self):
            self.kept, self.tokens = [], []

        @hookimpl
        def store_prefix(self, seq):
            self.kept = [cache.snapshot() for cache in seq.caches]
            self.tokens = seq.tokens[: seq.n_prompt]

        @hookimpl
        def restore_prefix(self, seq):
            same = [a == b for a, b in zip(self.tokens, seq.tokens[:-1])]
            shared = next((i for i, equal in enumerate(same) if not equal), len(same))
            for cache, state in zip(seq.caches, self.kept):
                cache.restore(state)
                cache.rollback(shared)
            return shared or None

    session = Session.open(MODEL, [Keeps()])
    assert answer(session) == PLAIN
    for prompt in (PROMPT, PROMPT + "then", PROMPT[:20] + "no"):
        before = session.report()["prompt_tokens"]
        assert answer(session, prompt) == run(prompt=prompt)
        assert session.report()["prompt_tokens"] - before < 10


# -- runtime --


def test_observers_see_every_step_and_change_nothing():
    sees = Sees()
    assert run(sees, max_tokens=4) == PLAIN[:4]
    layers = MODEL.n_layers
    counts = {name: sees.seen.count(name) for name in set(sees.seen)}
    assert counts == {
        "on_attention": 4 * layers,
        "on_layer": 4 * layers,
        "on_logits": 4,
        "on_token": 4,
        "on_step": 4,
    }
    first = sees.seen[: 2 * layers + 3]
    assert first == ["on_attention", "on_layer"] * layers + ["on_logits", "on_token", "on_step"]


def test_on_attention_sees_queries_and_the_cache_they_used():
    class Looks:
        exact = True

        @hookimpl
        def on_attention(self, seq, layer, q, cache):
            assert q.shape == (len(cache) - seq.cached, 4, 8) and cache is seq.caches[layer]

    assert run(Looks()) == PLAIN


def test_on_layer_leaves_the_remaining_layers_out():
    class Exit:
        @hookimpl
        def on_layer(self, step, layer, hidden):
            assert hidden.shape == (len(step.tokens), 32)
            return layer == 1

    class Skip:
        @hookimpl
        def layer_order(self):
            return [0, 1]

    assert run(Exit()) == run(Skip()) != PLAIN


def test_on_logits_edits_them_for_the_draft_too():
    assert run(Repeats(), max_tokens=20) == [(len(PROMPT) + i) % 5 for i in range(20)]
    session = Session.open(MODEL, [Repeats(), Copies()])
    assert answer(session, max_tokens=20) == run(Repeats(), max_tokens=20)
    assert session.report()["accepted"] > 8


def test_on_token_gives_a_reason_to_stop():
    class Enough:
        @hookimpl
        def on_token(self, seq, token):
            assert seq.tokens[-1] == token
            return "enough" if seq.n_new == 5 else None

    session = Session.open(MODEL, [Enough(), Drafts(lambda seq: PLAIN[seq.n_new :])])
    text = session.text(PROMPT, max_tokens=32, temp=0.0)
    assert len(list(text)) == 5
    assert (text.stop, text.seq.new, text.seq.cached) == ("enough", PLAIN[:5], len(PROMPT) + 4)


def test_on_step_comes_after_acceptance_and_may_evict_and_preempt():
    class Preempts:
        exact = True

        @hookimpl
        def on_step(self, step):
            (part,) = step.parts
            seq = part.seq
            assert all(len(cache) == seq.cached for cache in seq.caches) and step.seconds > 0
            assert seq.cached == len(seq.tokens) - 1 or not part.accepted
            if seq.n_new in (3, 9) and seq.notes.get("done") != seq.n_new:
                seq.notes["done"] = seq.n_new
                seq.rollback(0)

    for chunk in (512, 7):
        session = Session.open(MODEL, [Preempts()], chunk=chunk)
        assert answer(session) == PLAIN
        assert session.report()["prompt_tokens"] == 3 * len(PROMPT)


def test_run_idle_comes_between_steps_only():
    class Idle:
        exact = True
        steps = idle = 0

        @hookimpl
        def on_step(self, step):
            self.steps += 1

        @hookimpl
        def run_idle(self, session):
            assert not session.loop.stepping
            self.idle += 1

    plugin = Idle()
    assert run(plugin, max_tokens=6) == PLAIN[:6]
    assert (plugin.steps, plugin.idle) == (6, 5)


# -- how they are called --


def test_the_first_named_is_called_first():
    seen = []

    class First:
        @hookimpl
        def on_token(self):
            seen.append("first")

    class Second:
        @hookimpl
        def on_token(self):
            seen.append("second")

    run(First(), Second(), max_tokens=1)
    assert seen == ["first", "second"]


def test_the_token_loop_never_calls_pluggy():
    pm = load([Sees(), Copies(), Together()])
    session = Session(MODEL, resolve(pm, MODEL))
    calls = []
    pm.add_hookcall_monitoring(lambda name, impls, kwargs: calls.append(name), lambda *outcome: None)
    assert answer(session) == PLAIN
    session.report()
    assert calls == []


def test_wrappers_see_what_they_wrap():
    class Owner:
        @hookimpl
        def kv_cache(self, model, layer):
            return LayerCache.factory(model, layer, dtype=np.float32) if layer else None

    class Wrapper:
        @hookimpl(wrapper=True)
        def kv_cache(self, layer):
            make = yield
            sizes.append(make().token_bytes)
            return make

    sizes = []
    session = Session.open(MODEL, [Wrapper(), Owner()])
    half, full = 2 * 2 * 8 * 2 + 4, 2 * 2 * 8 * 4 + 4
    assert sizes == [half, full, full]
    names = ("built in, wrapped by wrapper", "owner, wrapped by wrapper", "owner, wrapped by wrapper")
    assert session.plan.owners["kv_cache"] == names


@pytest.mark.parametrize("hook", hookspecs.CALLS)
def test_hooks_that_run_as_plain_calls_cannot_be_wrapped(hook):
    def wrap(self):
        yield

    cls = type("Wraps", (), {hook: hookimpl(wrapper=True)(wrap)})
    with pytest.raises(PluginError, match=f"wraps: {hook} runs as a plain call and cannot be a wrapper"):
        Session.open(MODEL, [cls()])
