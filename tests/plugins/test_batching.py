"""batching: each request gets its plain tokens whatever runs beside it; rank, ageing, limits, cancellation."""

import random
import re

import pytest
from tests.toy import MODEL, PROMPT, PROMPTS, Copies, run

from cmr import PluginError, Session, hookimpl
from cmr.testing import ToyModel, check

SAMPLED = {"temp": 1.0, "seed": 3}


class Clock:
    """A clock that stands still until it is told."""

    now = 0.0

    def __call__(self):
        return self.now


def opened(options="", *others, model=MODEL):
    session = Session.open(model, [f"batching{':' if options else ''}{options}", *others])
    return session, session.plan.plugins["batching"]


def add(session, prompt=PROMPT, max_tokens=24, **options):
    return session.add(session.request(prompt, max_tokens=max_tokens, **{"temp": 0.0} | options))


def finish(session, steps=10_000):
    for _ in range(steps):
        if not session.step():
            return
    raise AssertionError("the requests do not end")


@pytest.mark.parametrize("others", [(), (Copies,)], ids=["alone", "drafts"])
@pytest.mark.parametrize(
    "options", ["", "tokens=8", "width=2,tokens=5", "kv=40kB,age=0.001", "width=1,tokens=3"]
)
def test_tokens_are_the_plain_runs(options, others):
    session, _ = opened(options, *(other() for other in others))
    wanted, seqs = [], []
    for settings in ({"temp": 0.0}, SAMPLED):
        for length, prompt in enumerate((*PROMPTS, PROMPT)):
            wanted.append(run(prompt=prompt, max_tokens=9 + 5 * length, **settings))
            seqs.append(add(session, prompt, 9 + 5 * length, **settings))
    finish(session)
    assert [seq.new for seq in seqs] == wanted


def test_steps_hold_as_many_sequences_and_rows_as_allowed():
    session, batching = opened("width=3,tokens=20")
    sizes = []

    class Looks:
        exact = True

        @hookimpl
        def on_step(self, step):
            sizes.append((len(step.parts), len(step.tokens)))

    session = Session.open(MODEL, [batching, Looks()])
    for _ in range(5):
        add(session, PROMPT, 12)
    finish(session)
    assert max(parts for parts, _ in sizes) == 3 and max(rows for _, rows in sizes) == 20
    assert batching.entries == {} and batching.report()["sequences"] > 1.5


def test_sequences_that_generate_go_on_while_a_long_prompt_comes_in():
    session, _ = opened("tokens=16")
    first = add(session, "abc", 40)
    session.step()
    add(session, "a long story " * 20, 4)
    before = first.n_new
    for _ in range(6):
        session.step()
    assert first.n_new == before + 6


def test_a_higher_priority_goes_first_and_takes_the_place_of_a_lower():
    session, batching = opened("width=1")
    batching.clock = Clock()
    low = add(session, "abc", 30)
    session.step()
    high = add(session, "one two", 5, priority=1)
    while high.stop is None:
        before = low.n_new
        session.step()
        assert low.n_new == before
    finish(session)
    assert (low.new, high.new) == (run(prompt="abc", max_tokens=30), run(prompt="one two", max_tokens=5))


def test_waiting_counts_so_that_nothing_starves():
    session, batching = opened("width=1,age=10")
    batching.clock = clock = Clock()
    high, low = add(session, "abc", 400, priority=3), add(session, "one two", 400, priority=0)
    turns = ""
    for _ in range(200):
        before = low.n_new, low.cached
        session.step()
        turns += "h" if (low.n_new, low.cached) == before else "l"
        clock.now += 1.0
    # It waits 3.5 steps of priority of 10 seconds each, then has a turn of as long as one of them.
    assert re.match("h{35,37}l{10}h{30,40}l{10}h", turns), turns
    assert high.new == run(prompt="abc", max_tokens=400)[: high.n_new]
    assert low.new == run(prompt="one two", max_tokens=400)[: low.n_new]


def test_equals_share_by_turns_in_order_of_arrival():
    session, batching = opened("width=2,age=10")
    batching.clock = clock = Clock()
    seqs = [add(session, prompt, 200) for prompt in ("abc", "def", "ghi", "jkl")]
    for _ in range(150):
        session.step()
        clock.now += 1.0
    counts = [seq.n_new for seq in seqs]
    assert sum(counts) == 300 and min(counts) > 50, counts


def test_kv_stays_within_its_limit_and_the_lowest_is_preempted():
    limit = 120_000
    session, batching = opened(f"kv={limit},age=1000")
    seqs = [add(session, PROMPT, 90, priority=-i) for i in range(8)]
    while session.step():
        held = sum(cache.nbytes for seq in seqs for cache in seq.caches)
        assert held <= limit, held
    assert batching.preempted > 0 and batching.report()["most_kv_bytes"] <= limit
    assert all(seq.new == run(max_tokens=90) for seq in seqs)


def test_a_sequence_that_is_larger_than_the_limit_runs_alone():
    session, _ = opened("kv=1kB")
    seqs = [add(session, PROMPT, 10) for _ in range(3)]
    finish(session)
    assert all(seq.new == run(max_tokens=10) for seq in seqs)


def test_cancelling_frees_kv_and_leaves_the_others_alone():
    session, batching = opened()
    seqs = [add(session, prompt, 20) for prompt in PROMPTS]
    for _ in range(4):
        session.step()
    gone = seqs[2]
    assert sum(cache.nbytes for cache in gone.caches) > 0
    session.cancel(gone)
    assert sum(cache.nbytes for cache in gone.caches) == 0 and gone not in batching.entries
    finish(session)
    for prompt, seq in zip(PROMPTS, seqs):
        assert seq is gone or seq.new == run(prompt=prompt, max_tokens=20)
    assert batching.ended == []


def test_without_a_limit_kv_of_an_answer_can_be_used_again():
    session, _ = opened()
    text = session.text(PROMPT, max_tokens=8, temp=0.0)
    for _ in text:
        pass
    again = session.text(text.seq.tokens, max_tokens=8, temp=0.0, after=text.seq)
    next(again)
    assert again.seq.borders[0] == len(PROMPT)


def test_a_request_that_fails_does_not_harm_the_others():
    class Fails:
        exact = True

        @hookimpl
        def on_token(self, seq, token):
            if seq.request.id == "bad" and seq.n_new == 5:
                raise ValueError("no")

    session, _ = opened("", Fails())
    seqs = [add(session, prompt, 20, id="bad" if i == 1 else None) for i, prompt in enumerate(PROMPTS)]
    finish(session)
    assert seqs[1].stop == "error" and "fails" in str(seqs[1].error) and seqs[1].caches == []
    for i in (0, 2, 3):
        assert seqs[i].new == run(prompt=PROMPTS[i], max_tokens=20)


@pytest.mark.parametrize("seed", range(6))
def test_arrivals_cancellations_and_pauses_at_random_change_no_token(seed):
    rng = random.Random(seed)
    session, batching = opened(
        f"width={rng.randint(1, 4)},tokens={rng.randint(4, 40)},kv=60kB,age=3", Copies()
    )
    batching.clock = clock = Clock()
    seqs = []
    for _ in range(120):
        clock.now += rng.random() * 3
        if len(seqs) < 12 and rng.random() < 0.3:
            seqs.append(add(session, rng.choice(PROMPTS), rng.randint(1, 30), priority=rng.randint(-2, 2)))
        if seqs and rng.random() < 0.03:
            session.cancel(rng.choice(seqs))
        session.step()
    finish(session)
    for seq in seqs:
        plain = run(prompt=seq.request.prompt, max_tokens=seq.request.max_tokens)
        assert seq.new == (plain[: seq.n_new] if seq.stop == "cancelled" else plain)
    assert batching.entries == {}


@pytest.mark.parametrize(
    "options, why",
    [
        ("width=0", "width is at least 1"),
        ("width=9,tokens=8", "tokens at least width"),
        ("age=0", "age is more than 0"),
        ("kv=much", "'much' is not a size"),
        ("kv=50%", "not a share"),
        ("wdth=3", "did you mean 'width'"),
    ],
)
def test_mistakes_are_refused(options, why):
    with pytest.raises(PluginError, match=f"batching.*{why}"):
        opened(options)


def test_the_contracts_hold():
    for options in ("batching", "batching:width=2,tokens=5,kv=30kB"):
        assert [finding for finding in check(options) if not finding.holds] == []


def test_windows_too():
    model = ToyModel(window=16)
    session, _ = opened("tokens=11", model=model)
    seqs = [add(session, prompt, 25) for prompt in PROMPTS]
    finish(session)
    assert [seq.new for seq in seqs] == [run(prompt=p, max_tokens=25, model=model) for p in PROMPTS]
