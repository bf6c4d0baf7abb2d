"""What drafts cost and when they pay; and that the rule by which the loop accepts them changes no distribution."""

from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import chisquare
from tests.models import Recipe, write_model
from tests.toy import MODEL, Drafts, answer, run

import cmr
from cmr import PluginError, Request, SamplerSettings, Session, hookimpl
from cmr.testing import ToyModel
from cmr_plugins.speculation import DEPTHS, GRID, SHARE, Pace

COSTS = {1: 1.0, 2: 1.3, 4: 2.1, 8: 3.3, 16: 6.5}


def step(rows, accepted, seconds=None, parts=1):
    shares = [SimpleNamespace(accepted=[0] * (accepted if part == 0 else 1)) for part in range(parts)]
    seconds = COSTS.get(rows, rows / 2.4) if seconds is None else seconds
    return SimpleNamespace(n_prompt=0, tokens=[0] * rows, parts=shares, seconds=seconds)


def simulate(chance, tokens=2000, start=1.5, drafts_right=None):
    """Plain steps, and drafts where Pace wants them, all of them failing unless said; seconds and tokens."""
    pace, rng = Pace(start), np.random.default_rng(0)
    pace.measured, spent, made = True, 0.0, 0
    while made < tokens:
        choices = pace.choices([chance**n for n in range(1, 16)], 1.05) if pace.ready else []
        depth = next((c.depth for c in choices if c.risk <= pace.room), 0)
        right = 0
        while right < depth and drafts_right is not None and rng.random() < drafts_right:
            right += 1
        done = step(1 + depth, 1 + right)
        pace.on_step(done)
        spent, made = spent + done.seconds, made + 1 + right
    return spent, made


@pytest.mark.parametrize("tokens", [100, 1000, 5000])
def test_drafts_that_seem_sure_and_always_fail_cost_little(tokens):
    spent, made = simulate(0.99, tokens)
    assert made < spent <= made * (1 + SHARE) + 1.5


def test_drafts_that_are_right_make_copies_fast():
    spent, made = simulate(0.97, drafts_right=0.97)
    assert made / spent > 1.8
    spent, made = simulate(0.3, drafts_right=0.3)
    assert made / spent > 0.98


def test_the_depth_follows_the_chances():
    pace = Pace(1.5)
    for _ in range(3):
        for rows in COSTS:
            pace.on_step(step(rows, 1))

    def best(chance):
        choices = pace.choices([chance**n for n in range(1, 16)], 1.05)
        return choices[0].depth if choices else 0

    depths = [best(chance) for chance in (0.1, 0.5, 0.8, 0.9, 0.99)]
    assert depths[0] == 0 and depths == sorted(depths) and depths[-1] in DEPTHS[2:]


def test_in_a_batch_a_draft_is_weighed_against_the_rows_of_all():
    pace = Pace(1.5)
    for _ in range(3):
        pace.on_step(step(16, 1))
        pace.on_step(step(8, 1, parts=8))
    alone = Pace(1.5)
    for _ in range(3):
        alone.on_step(step(1, 1))
    (batch,), (single,) = pace.choices([0.9], 0), alone.choices([0.9], 0)
    assert batch.speed == pytest.approx(1.9 / (6.5 / 3.3)) and batch.risk == pytest.approx(
        8 * (6.5 / 3.3 - 1)
    )
    assert single.speed == pytest.approx(1.9 / GRID[2]) and single.risk == pytest.approx(GRID[2] - 1)


def test_a_step_that_was_disturbed_does_not_end_drafting():
    pace = Pace(1.5)
    for _ in range(4):
        pace.on_step(step(1, 1))
    before = pace.room
    pace.on_step(step(4, 4, seconds=60.0))
    assert pace.room > before - 2


def test_the_curve_is_measured_in_bounded_time_without_touching_requests():
    pace, session = Pace(1.5), Session.open(MODEL)
    pace.measure(MODEL, session.plan)
    assert pace.measured and set(pace.ratios) == set(COSTS)
    assert all(1 <= ratio <= rows for rows, ratio in pace.ratios.items() if rows > 1)
    assert pace.ratio(3) == pytest.approx((pace.ratios[2] + pace.ratios[4]) / 2)


def test_steps_recorded_while_they_were_timed_serve_the_request(tmp_path, monkeypatch):
    recipe = Recipe(layers=2, width=64, heads=2, kv_heads=1, dim=32, dim_v=32, inner=64)
    model = cmr.open_model(write_model(tmp_path / "model.gguf", recipe), threads=1)
    tokens = [5, 6, 7, 8] * 20
    try:
        plain = list(Session.open(model).generate(Request(tokens, 60, SamplerSettings(temp=0.0))))
        session, made, recording = Session.open(model, ["spec-lookup:gain=0.01"]), [], model.ops.recording
        monkeypatch.setattr(model.ops, "recording", lambda: made.append(1) or recording())
        answer = session.generate(Request(tokens, 60, SamplerSettings(temp=0.0)))
        timed = len(made)
        assert timed and list(answer) == plain and len(made) == timed
        assert session.report()["spec-lookup"]["drafted"] > 0
    finally:
        model.close()


# -- the rule of the loop --


class Chain(ToyModel):
    """Logits from a table by the last two tokens, so that distributions are known."""

    def __init__(self, table):
        super().__init__()
        self.table = np.full((*table.shape[:2], self.n_vocab), -np.inf, np.float32)
        self.table[:, :, : table.shape[2]] = table

    def forward(self, plan, step):
        out = []
        for part in step.parts:
            text = part.seq.tokens + part.draft
            ends = range(part.pos[-1] + 1 - part.want, part.pos[-1] + 1)
            out.append(np.array([self.table[text[end - 1], text[end]] for end in ends]))
        return out


class Script:
    """A sampler that takes the tokens it is told and multiplies up what the rows give them."""

    def __init__(self, tokens):
        self.tokens, self.chance = tokens, Fraction(1)

    def sample(self, logits, history, index):
        shares = [int(x) for x in logits[np.isfinite(logits)]]
        self.chance *= Fraction(shares[self.tokens[index]], sum(shares))
        return self.tokens[index]


def test_every_answer_has_exactly_its_probability_whatever_is_drafted():
    tokens, length = 3, 3
    shares = np.random.default_rng(1).integers(1, 9, (tokens, tokens, tokens))
    model = Chain(shares.astype(float))

    def chance_of(text, draft):
        session = Session.open(model, [Drafts(lambda seq: list(draft[seq.n_new - 1 :]))])
        request = session.request([0, 1], max_tokens=length)
        seq = session.add(request)
        seq.sampler = script = Script(text)
        while session.step():
            pass
        assert seq.new == list(text)
        return script.chance

    for draft in [(), *product(range(tokens), repeat=1), *product(range(tokens), repeat=2)]:
        total = Fraction(0)
        for text in product(range(tokens), repeat=length):
            wanted, before = Fraction(1), [0, 1]
            for token in text:
                row = shares[before[-2], before[-1]]
                wanted *= Fraction(int(row[token]), int(row.sum()))
                before.append(token)
            found = chance_of(text, draft)
            assert found == wanted
            total += found
        assert total == 1


def test_a_hundred_thousand_draws_have_the_distribution_of_the_model():
    tokens = 5
    table = np.random.default_rng(2).normal(size=(tokens, tokens, tokens)) * 1.5
    session = Session.open(Chain(table), ["spec-lookup:gain=0,ngram=2,depth=3"])
    options = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    counts = np.zeros((tokens, tokens, tokens))
    for seed in range(100):
        text = [0, 1] + answer(session, [0, 1], max_tokens=1000, seed=seed, **options)
        np.add.at(counts, (text[:-2], text[1:-1], text[2:]), 1)
    assert counts.sum() == 100_000
    report = session.report()["spec-lookup"]
    assert report["drafted"] > 50_000 and 0.1 < report["accepted"] / report["drafted"] < 0.9
    chances = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    values = [
        chisquare(seen, seen.sum() * share).pvalue
        for seen, share in zip(counts.reshape(-1, tokens), chances.reshape(-1, tokens))
        if seen.sum() > 200
    ]
    assert len(values) > 15 and min(values) > 0.01 / len(values)


@pytest.mark.parametrize(
    "junk",
    [
        lambda seq: [0] * 5,
        lambda seq: [7, 8, 9] * 400,
        lambda seq: [],
        lambda seq: range(seq.n_new % 9),
        lambda seq: np.array([5, 6], np.int64),
    ],
)
@pytest.mark.parametrize("options", [{}, {"temp": 1.0, "seed": 4}])
def test_junk_does_no_harm(junk, options):
    assert run(Drafts(junk), **options) == run(**options)


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (lambda seq: [96], r"drafts: propose returned \[96\]; it returns token ids of 0 to 95"),
        (lambda seq: [-3], "drafts: propose returned"),
        (lambda seq: None, "drafts: propose returned None"),
        (lambda seq: ["a"], "drafts: propose returned"),
    ],
)
def test_what_cannot_be_a_draft_is_named_and_the_session_survives(junk, message):
    broken = True
    session = Session.open(MODEL, [Drafts(lambda seq: junk(seq) if broken else [])])
    with pytest.raises(PluginError, match=message):
        answer(session)
    broken = False
    assert answer(session) == run()


def test_a_drafter_that_raises_is_named():
    class Fails:
        @hookimpl
        def drafter(self):
            return self

        def propose(self, seq):
            return seq.tokens[len(seq.tokens)]

    session = Session.open(MODEL, [Fails()])
    with pytest.raises(PluginError, match="fails failed in propose: IndexError"):
        answer(session)
