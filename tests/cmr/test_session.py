"""The token loop and what a session offers around it: exactness, interruption, limits, chat, figures."""

import gc
import weakref
from itertools import zip_longest

import numpy as np
import pytest
from tests.toy import MODEL, PROMPT, PROMPTS, Bans, Copies, Drafts, Together, answer, run

from cmr import LayerCache, Request, RequestError, SamplerSettings, Session, hookimpl
from cmr.testing import ToyModel

PLAIN = run()
SEEDED = {"temp": 1.0, "seed": 11}


def finished(session, *args, **options):
    """Run an answer to its end and return its Text."""
    text = session.text(*args, **{"temp": 0.0, "max_tokens": 16} | options)
    for _ in text:
        pass
    return text


# -- exactness --


@pytest.mark.parametrize("chunk", [1, 3, 16, 51, 52, 512])
@pytest.mark.parametrize("options", [{}, SEEDED])
def test_chunks_change_nothing(chunk, options):
    assert answer(Session.open(MODEL, chunk=chunk), **options) == run(**options)


@pytest.mark.parametrize("plugins", [(), (Copies,), (Together,), (Copies, Together)])
def test_requests_that_run_by_turns_give_what_each_gives_alone(plugins):
    session = Session.open(MODEL, [cls() for cls in plugins], chunk=9)
    texts = [session.text(prompt, max_tokens=20, **SEEDED) for prompt in PROMPTS]
    pieces = list(zip_longest(*texts, fillvalue=""))
    for place, prompt in enumerate(PROMPTS):
        alone = Session.open(MODEL).text(prompt, max_tokens=20, **SEEDED)
        assert "".join(row[place] for row in pieces) == "".join(alone)
        assert texts[place].seq.new == alone.seq.new


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_batches_with_drafts_give_what_each_gives_alone(rows):
    session = Session.open(MODEL, [Together(rows=rows, width=3), Copies()])
    requests = [session.request(prompt, max_tokens=10 + i, temp=0.0) for i, prompt in enumerate(PROMPTS * 2)]
    got = {id(request): [] for request in requests}
    for request, token in session.stream(requests):
        got[id(request)].append(token)
    for i, request in enumerate(requests):
        assert got[id(request)] == run(prompt=PROMPTS[i % 4], max_tokens=10 + i)


def test_a_request_can_run_any_number_of_times():
    session = Session.open(MODEL)
    request = session.request(PROMPT, max_tokens=9, temp=1.0)
    assert len({tuple(session.generate(request)) for _ in range(3)}) == 1


def test_tokens_and_text_are_the_same_prompt():
    assert run(prompt=MODEL.tokenizer.encode(PROMPT)) == PLAIN
    assert run(prompt=np.array(MODEL.tokenizer.encode(PROMPT))) == PLAIN
    assert list(Session.open(MODEL).generate(Request(PROMPT, 5, SamplerSettings(temp=0.0)))) == PLAIN[:5]


# -- why an answer ends --


def test_an_answer_ends_at_its_length_or_with_the_context():
    small = ToyModel(context=64)
    for session in (Session.open(small), Session.open(MODEL, context=64)):
        for drafts in ({}, {"max_tokens": None}, {"max_tokens": -1}, {"max_tokens": 500}):
            text = finished(session, PROMPT, **{"max_tokens": None} | drafts)
            assert (text.stop, len(text.seq.tokens)) == ("context", 64)
        assert finished(session, PROMPT, max_tokens=3).stop == "length"
    drafted = finished(Session.open(small, [Drafts(lambda seq: [1] * 20)]), PROMPT, max_tokens=None)
    assert (drafted.stop, len(drafted.seq.tokens)) == ("context", 64)


def test_an_answer_of_no_tokens_only_feeds_the_prompt():
    text = finished(Session.open(MODEL, chunk=20), PROMPT, max_tokens=0)
    assert (text.stop, text.seq.new, text.seq.cached) == ("length", [], len(PROMPT))


def test_the_models_end_token_ends_unless_it_is_ignored():
    class Ends:
        @hookimpl
        def on_logits(self, seq, draft, logits):
            logits[:, MODEL.tokenizer.eos] += 50.0 if seq.n_new >= 4 else 0.0

    session = Session.open(MODEL, [Ends()])
    text = finished(session, PROMPT)
    assert (text.stop, text.seq.new) == ("eos", [*PLAIN[:4], MODEL.tokenizer.eos])
    text = finished(session, PROMPT, ignore_eos=True)
    assert text.stop == "length" and MODEL.tokenizer.eos not in text.seq.new
    text = finished(session, PROMPT, stop_ids=frozenset({PLAIN[2]}))
    assert text.stop == "eos" and text.seq.new == PLAIN[: PLAIN.index(PLAIN[2]) + 1]


def test_a_stop_string_ends_text_and_tokens():
    whole = MODEL.tokenizer.decode(PLAIN)
    stop = whole[7:9]
    text = Session.open(MODEL).text(PROMPT, max_tokens=32, temp=0.0, stop=stop)
    assert "".join(text) == whole[: whole.index(stop)] and text.stop == "stop"
    session = Session.open(MODEL, [Drafts(lambda seq: PLAIN[seq.n_new : seq.n_new + 5])])
    tokens = answer(session, stop=[stop, "never"])
    assert tokens == PLAIN[: whole.index(stop) + 2]


# -- giving up --


def test_a_cancelled_answer_leaves_no_trace():
    session = Session.open(MODEL)
    text = session.text(PROMPT, max_tokens=32, temp=0.0)
    next(text)
    session.cancel(text.seq)
    assert list(text) == [] and text.stop == "cancelled" and not session.loop.running
    assert answer(session) == PLAIN


def test_an_answer_that_nobody_reads_any_more_is_cancelled():
    session = Session.open(MODEL)
    for _ in session.text(PROMPT):
        break
    for _ in session.generate(session.request(PROMPT)):
        break
    unread = session.text(PROMPT)
    gc.collect()
    assert not session.loop.running and unread.seq.stop is None
    assert answer(session) == PLAIN


def test_cancelling_from_a_plugin_takes_effect_after_the_step():
    class Cancels:
        @hookimpl
        def start_session(self, session):
            self.session = session

        @hookimpl
        def on_step(self, step):
            if step.parts[0].seq.n_new == 3:
                self.session.cancel(step.parts[0].seq)

    text = finished(Session.open(MODEL, [Cancels()]), PROMPT)
    assert (text.stop, text.seq.new) == ("cancelled", PLAIN[:3])


@pytest.mark.parametrize("place", ["on_attention", "on_layer", "on_logits", "on_token", "on_step"])
def test_ctrl_c_leaves_a_session_that_can_go_on(place):
    class Interrupts:
        exact = True
        countdown = 0

    def interrupt(self, **_):
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyboardInterrupt

    namespace = {"interrupt": interrupt}
    exec("def hook(self):\n    interrupt(self)", namespace)
    setattr(Interrupts, place, hookimpl(namespace["hook"]))
    plugin = Interrupts()
    session = Session.open(MODEL, [plugin, Drafts(lambda seq: PLAIN[seq.n_new : seq.n_new + 3])])
    for countdown in (1, 4, 5):
        plugin.countdown = countdown
        seq = session.add(session.request(PROMPT, max_tokens=32, temp=0.0))
        with pytest.raises(KeyboardInterrupt):
            while seq.stop is None:
                session.step()
        while seq.stop is None:
            session.step()
        assert seq.new == PLAIN
        assert not session.step()
        plugin.countdown = countdown
        with pytest.raises(KeyboardInterrupt):
            answer(session)
        assert not session.loop.running
    assert answer(session) == PLAIN


def test_requests_may_be_added_while_others_run():
    session = Session.open(MODEL, [Together()])
    first = session.add(session.request(PROMPT, max_tokens=20, temp=0.0))
    for _ in range(8):
        session.step()
    second = session.add(session.request(PROMPTS[0], max_tokens=6, temp=0.0), text=True)
    while session.step():
        pass
    assert first.new == list(first.out) == PLAIN[:20]
    assert second.new == run(prompt=PROMPTS[0], max_tokens=6)
    assert "".join(second.text.pieces) == MODEL.tokenizer.decode(second.new)


# -- what is refused before anything runs --


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.text("a" * 2000), "the prompt has 2000 tokens and the context holds 1024"),
        (lambda s: s.text(""), "the prompt is empty"),
        (lambda s: s.text([]), "the prompt is empty"),
        (lambda s: s.text([1, 500]), "token 500 is not in the vocabulary, which has ids 0 to 95"),
        (lambda s: s.text([1, "a"]), "a prompt is a text or a list of token ids"),
        (
            lambda s: s.text("a", temprature=1),
            "a request has no option 'temprature'; did you mean 'temperature'",
        ),
        (lambda s: s.text("a", temp=1, top_p=3), "top_p is 3; it must be"),
        (lambda s: s.text("a", max_tokens="3"), "max_tokens is '3'; it must be a whole number or None"),
        (lambda s: s.text("a", stop=""), "stop is .*; it must be texts, none empty"),
        (lambda s: s.generate(Request(None)), "a request needs a prompt"),
        (lambda s: list(s.stream([Request("ab"), Request([700])])), "token 700"),
        (
            lambda s: s.text("a", plugins={"bann": {}}),
            "this session has no plugin 'bann'; did you mean 'bans'",
        ),
        (
            lambda s: s.text("a", plugins={"bans": {"tokn": 3}}),
            "bans takes from a request no option 'tokn'; did you mean 'token'",
        ),
        (
            lambda s: s.text("a", plugins={"copies": {"n": 3}}),
            "copies takes .* no option 'n'; there are none",
        ),
        (lambda s: s.text("a", plugins=["bans"]), "plugins is .'bans'.; it must be a dict of names"),
        (lambda s: s.text("a", plugins={"bans": 3}), "plugins is .*; it must be a dict of names"),
        (lambda s: s.generate(Request("a", plugins={"stop-loop": {}})), "no plugin 'stop-loop'"),
        (lambda s: Session.open(MODEL, chunks=3), "a session has no limit 'chunks'; did you mean 'chunk'"),
        (lambda s: Session.open(MODEL, context=4096), "context 4096 is more than the 1024"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(call, message):
    session = Session.open(MODEL, [Bans(), Copies()])
    with pytest.raises(RequestError, match=message):
        call(session)
    assert session.report()["steps"] == 0


def test_a_request_tells_a_plugin_something_that_others_do_not_hear():
    session = Session.open(MODEL, [Bans()])
    banned = PLAIN[0]
    told = session.request(PROMPT, max_tokens=8, temp=0.0, plugins={"bans": {"token": banned}})
    found = list(session.generate(told))
    assert banned not in found and found == list(session.generate(told))
    assert answer(session) == PLAIN


# -- going on --


class Kept(LayerCache):
    """A cache that can only be emptied."""

    can_rollback = False


def turns(session, n=3):
    """A conversation of some turns: (tokens of each answer, prompt tokens fed for each turn)."""
    tokens, last, fed, answers = [], None, [], []
    for turn in range(n):
        tokens = tokens + MODEL.tokenizer.encode(f"turn {turn}, and what now? ")
        before = session.report()["prompt_tokens"]
        text = finished(session, tokens, after=last, max_tokens=8)
        fed.append(session.report()["prompt_tokens"] - before)
        answers.append(text.seq.new)
        last, tokens = text.seq, text.seq.tokens
    return answers, fed


def test_a_chat_feeds_only_what_is_new():
    answers, fed = turns(Session.open(MODEL))
    first = len("turn 0, and what now? ")
    assert fed == [first, first + 1, first + 1]  # an answer's last token was not fed before
    assert answers == turns(Session.open(MODEL, chunk=4))[0]
    assert answers == turns(Session.open(MODEL, [Copies(), Together()]))[0]


def test_what_an_earlier_answer_does_not_share_is_forgotten():
    session = Session.open(MODEL)
    first = finished(session, PROMPT).seq
    other = PROMPT[:20] + "something else"
    second = finished(session, other, after=first)
    assert second.seq.new == run(prompt=other, max_tokens=16)
    assert first.caches == [] and first.cached == 0
    assert finished(session, PROMPT, after=first).seq.new == PLAIN[:16]


def test_a_preempted_chat_keeps_each_tokens_role():
    class Preempts:
        exact = True

        @hookimpl
        def on_step(self, step):
            seq = step.parts[0].seq
            if seq.n_new == 5 and "done" not in seq.notes:
                seq.notes["done"] = True
                seq.rollback(0)

    plain = turns(Session.open(MODEL))[0]
    assert turns(Session.open(MODEL, [Preempts()]))[0] == plain
    assert turns(Session.open(MODEL, [Preempts(), Copies()], chunk=5))[0] == plain


def test_a_cache_that_cannot_roll_back_is_used_again_where_nothing_must_be_forgotten():
    class Owner:
        @hookimpl
        def kv_cache(self, model, layer):
            return Kept.factory(model, layer)

    session = Session.open(MODEL, [Owner()])
    assert turns(session)[1][1:] == [23, 23]
    first = finished(session, PROMPT).seq
    assert finished(session, PROMPT[:9] + "x", after=first).seq.new == run(
        prompt=PROMPT[:9] + "x", max_tokens=16
    )


def test_an_interrupted_answer_can_be_gone_on_from():
    session = Session.open(MODEL)
    text = session.text(PROMPT, temp=0.0)
    for _ in range(4):
        next(text)
    session.cancel(text.seq)
    again = finished(session, text.seq.tokens, after=text.seq, max_tokens=4)
    assert session.report()["prompt_tokens"] == len(PROMPT) + 1
    assert len(again.seq.new) == 4


def test_going_on_needs_a_finished_sequence_of_the_same_session():
    session, other = Session.open(MODEL), Session.open(MODEL)
    last = finished(session, "abc").seq
    running = session.add(session.request("abc"))
    for wrong in (lambda: other.text("abcd", after=last), lambda: session.text("abcd", after=running)):
        with pytest.raises(RequestError, match="goes on after a sequence that has ended in the same session"):
            wrong()


def test_who_holds_a_sequence_holds_its_kv_and_nobody_else():
    session = Session.open(MODEL)
    text = finished(session, PROMPT)
    cache = weakref.ref(text.seq.caches[0])
    answer(session)
    assert cache() is not None
    del text
    gc.collect()
    assert cache() is None


# -- figures --


def test_figures_count_what_happened():
    session = Session.open(MODEL, [Drafts(lambda seq: [*PLAIN[seq.n_new : seq.n_new + 2], 0])], chunk=20)
    tokens = answer(session, max_tokens=10)
    figures = session.report()
    assert tokens == PLAIN[:10]
    assert figures["requests"] == 1 and figures["prompt_tokens"] == len(PROMPT) and figures["tokens"] == 10
    assert figures["steps"] == 3 + 3 and figures["drafted"] == 8 and figures["accepted"] == 6
    assert 0 < figures["time_to_first_token"] <= figures["prompt_seconds"] * 1.5 + 0.05
    assert figures["prompt_tps"] == pytest.approx(len(PROMPT) / figures["prompt_seconds"])
    assert figures["decode_tps"] == pytest.approx(9 / figures["decode_seconds"])
    assert figures["weight_bytes"] == MODEL.file.nbytes - MODEL.embed.nbytes
    assert figures["kv_bytes"] >= (len(PROMPT) + 9) * session.plan.memory.kv_token


def test_a_tied_embedding_is_read_for_every_token():
    from types import SimpleNamespace

    from cmr.stats import size, token_bytes

    def read(*names, router=None):
        file = SimpleNamespace(tensors=dict.fromkeys(names, SimpleNamespace(nbytes=10)))
        config = SimpleNamespace(router=router, n_layers=1, n_drafting=1)
        return token_bytes(SimpleNamespace(file=file, config=config))

    assert read("token_embd.weight", "blk.0.x") == 20
    assert read("blk.0.x", "blk.1.x") == 10  # which only drafts
    assert read("token_embd.weight", "output.weight") == 10
    chosen = SimpleNamespace(used=2, experts=5)
    assert read("blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_inp.weight", router=chosen) == 14
    assert [size(n) for n in (0, 999, 1500, 4.37e9, 2e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "4.37 GB",
        "2e+03 TB",
    ]


def test_a_plugins_report_must_be_a_dict():
    from cmr import PluginError

    class Reports:
        @hookimpl
        def report(self):
            return 3

    with pytest.raises(PluginError, match="reports returned 3 from report; it returns a dict"):
        Session.open(MODEL, [Reports()]).report()


def test_a_failing_background_hook_is_heard_once():
    from cmr import PluginError

    class Idles:
        exact = True

        @hookimpl
        def run_idle(self, session):
            raise OSError("disk")

    session = Session.open(MODEL, [Idles()])
    with pytest.raises(PluginError, match="idles failed in run_idle: OSError: disk"):
        answer(session)
    assert answer(session) == PLAIN


def test_a_fingerprint_differs_where_tokens_could():
    from cmr.testing import ToyModel

    sessions = {
        "plain": Session.open(MODEL),
        "seed": Session.open(ToyModel(seed=1)),
        "context": Session.open(MODEL, context=99),
        "plugin": Session.open(MODEL, ["stop-loop"]),
        "option": Session.open(MODEL, ["stop-loop:times=9"]),
    }
    prints = {name: session.fingerprint() for name, session in sessions.items()}
    assert len(set(prints.values())) == len(prints)
    assert Session.open(ToyModel()).fingerprint() == prints["plain"]
    assert sessions["plugin"].fingerprint("stop-loop") == prints["plain"]


def test_a_fingerprint_has_what_a_plugin_settled_beside_its_options():
    class Decides:
        """Decide something from a file, say."""

        exact = False

        def __init__(self, found):
            self.found = found

        @hookimpl
        def start_session(self, session):
            self.settled = (self.found,)

    first, other, again = (Session.open(MODEL, [Decides(found)]).fingerprint() for found in "aba")
    assert first == again != other
