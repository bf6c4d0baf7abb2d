"""tuner: what it costs against the best static setting on made-up traces, that tokens stay, and when it changes."""

from types import SimpleNamespace

import numpy as np
import pytest
from tests.beside import PROMPTS, alone, answer, tiny
from tests.toy import MODEL, Together, run

import cmr
from cmr import Session
from cmr.testing import check
from cmr_plugins.arms import Arms

SHARE, USES, SEEDS = 0.02, 600, 20

# What a unit of work costs with each setting, the first being the usual one, at the share x of a trace.
TRACES = {
    "the usual is best": lambda x: (1, 1.1, 1.3, 2),
    "all alike": lambda x: (1, 1, 1, 1),
    "a third is best": lambda x: (1, 1.2, 0.8, 1.5),
    "the usual is the worst": lambda x: (1, 0.9, 0.75, 0.5),
    "two settings": lambda x: (1, 1.9),
    "the work changes": lambda x: (1, 1.4, 2) if x < 0.5 else (1.3, 0.8, 2),
    "the work changes to the usual": lambda x: (1, 0.7, 2) if x < 0.5 else (1, 1.5, 2),
    "only another setting's cost changes": lambda x: (1, 1.4) if x < 0.5 else (1, 0.7),
}


def trace(shape, seed, noise=0.1, drift=0.15):
    """Costs [uses, settings] and the work of each use: noise of each use, a speed of the machine that wanders."""
    rng = np.random.default_rng(seed)
    level, levels = 0.0, []
    for _ in range(USES):
        level = 0.95 * level + drift * np.sqrt(1 - 0.95**2) * rng.standard_normal()
        levels.append(level)
    costs = np.array([TRACES[shape](use / USES) for use in range(USES)]) * np.exp(levels)[:, None]
    return costs * np.exp(noise * rng.standard_normal(costs.shape)), rng.lognormal(0, 0.5, USES)


def play(costs, sizes, share=SHARE):
    """Run a trace; the seconds that it took, and what was used each time."""
    arms, used = Arms(costs.shape[1], share), []
    for cost, size in zip(costs, sizes):
        used.append(arms.choose())
        arms.learn(cost[used[-1]], size)
    return float((costs[np.arange(USES), used] * sizes).sum()), used


@pytest.mark.parametrize("shape", TRACES)
def test_regret_against_the_best_static_setting_is_under_5_percent(shape):
    regrets = []
    for seed in range(SEEDS):
        costs, sizes = trace(shape, seed)
        regrets.append(play(costs, sizes)[0] / (costs * sizes[:, None]).sum(0).min() - 1)
    assert np.mean(regrets) < 0.05, regrets
    if "changes" in shape:  # no static setting is the best of both halves
        assert np.mean(regrets) < -0.03


def test_it_finds_the_best_and_stays_there():
    for shape, best in (("a third is best", 2), ("the usual is the worst", 3), ("the usual is best", 0)):
        costs, sizes = trace(shape, 1, noise=0.03, drift=0.1)
        used = play(costs, sizes)[1]
        assert np.mean(np.array(used[100:]) == best) > 0.85


def test_when_the_work_changes_it_changes_too():
    costs, sizes = trace("the work changes", 2, noise=0.05)
    used = np.array(play(costs, sizes)[1])
    assert np.mean(used[50:300] == 0) > 0.85 and np.mean(used[340:] == 1) > 0.85


def test_a_smaller_share_is_a_smaller_loss():
    costs, sizes = trace("two settings", 3)
    plain = (costs[:, 0] * sizes).sum()
    few, many = (play(costs, sizes, share)[0] / plain - 1 for share in (0.005, 0.1))
    assert 0 < few < 0.02 and few < many


def test_every_try_lies_between_two_uses_of_the_best():
    costs, sizes = trace("a third is best", 4)
    arms, tried = Arms(4, SHARE), []
    for cost, size in zip(costs, sizes):
        best, arm = arms.best, arms.choose()
        tried.append(arm != best)
        arms.learn(cost[arm], size)
    assert sum(tried) > 10 and not any(a and b for a, b in zip(tried, tried[1:]))


# -- the plugin --


class Text:
    """A sequence of so many tokens."""

    def __init__(self, size):
        self.tokens = [0] * size


def stepped(tuner, seconds, prompt=40, tokens=8):
    """Let a request run through the plugin's hooks, with seconds(threads, rows) for each step."""
    seq = Text(prompt)
    tuner.inner = SimpleNamespace(add=lambda seq: None, remove=lambda seq: None, pick=lambda: [(seq, 512)])
    tuner.add(seq)
    ((_, rows),) = tuner.pick()
    for n_prompt, n in [(prompt, prompt), *[(0, 1)] * tokens]:
        took = seconds(tuner.ops.threads, rows, n_prompt)
        tuner.on_step(
            SimpleNamespace(n_prompt=n_prompt, tokens=[0] * n, parts=[SimpleNamespace(seq=seq)], seconds=took)
        )
    tuner.remove(seq)


def made(**options):
    """The plugin in a session whose op table has eight threads."""
    session = Session.open(MODEL, [("tuner", options)])
    tuner = session.plan.plugins["tuner"]

    class Table:
        threads = prompt_threads = 8

        def use(self, threads, prompt_threads):
            if max(threads, prompt_threads) > 8:
                raise cmr.ModelError("8 are there")
            self.threads, self.prompt_threads = threads, prompt_threads

    tuner.start_session(SimpleNamespace(model=SimpleNamespace(ops=Table()), plan=session.plan))
    return tuner


def test_halves_of_the_threads_are_tried_and_the_fastest_is_kept():
    tuner = made()
    assert tuner.counts == [8, 4, 2, 1]
    times = {8: 1.0, 4: 0.6, 2: 0.9, 1: 1.7}
    for _ in range(80):
        stepped(tuner, lambda threads, rows, prompt: 1e-3 * (times[threads] if not prompt else 1))
    report = tuner.report()
    assert report["threads"] == 4 and report["prompt_threads"] == 8 and report["changes"] == 1


def test_prompts_are_tuned_by_themselves():
    tuner = made(chunks=(128, 32), threads=(8, 4))
    for _ in range(80):
        stepped(tuner, lambda threads, rows, prompt: 0.5e-3 if prompt and rows == 32 else 1e-3)
    assert tuner.report() | {"tries": 0} == {
        "threads": 8, "prompt_threads": 8, "prompt_rows": 32, "tries": 0, "changes": 1,
    }  # fmt: skip


def test_nothing_changes_while_anything_runs():
    tuner = made()
    kept = [Text(1) for _ in range(30)]
    tuner.inner = SimpleNamespace(add=lambda seq: None, remove=lambda seq: None)
    used = set()
    tuner.add(kept[0])
    for seq in kept[1:]:
        tuner.add(seq)
        tuner.remove(seq)
        used.add(tuner.ops.threads)
    assert used == {8} and tuner.generating.tries == 0


@pytest.mark.parametrize(("options", "message"), [
    ("share=0", "share is above 0"), ("threads=[0]", "at least 1"), ("chunks=[0]", "at least 1"),
])  # fmt: skip
def test_options_that_make_no_sense(options, message):
    with pytest.raises(cmr.PluginError, match=message):
        Session.open(MODEL, [f"tuner:{options}"])


def test_threads_that_are_not_there_are_refused_at_once():
    with pytest.raises(cmr.ModelError, match="8 are there"):
        made(threads=(16,))


def test_nothing_changes_and_the_contracts_hold():
    assert run("tuner:chunks=[2,5]") == run() == run("tuner", Together())
    assert [finding for finding in check("tuner") if not finding.holds] == []


def test_tokens_of_a_real_model_stay_while_threads_and_chunks_change():
    model = cmr.open_model(tiny().path, threads=2)
    session, used = Session.open(model, ["tuner:chunks=[5,64],share=0.5", "spec-lookup"]), set()
    plain = dict(zip(PROMPTS, alone([])))
    for prompt in PROMPTS * 6:
        assert answer(session, prompt) == plain[prompt]
        used.add((model.ops.threads, model.ops.prompt_threads))
    assert len(used) > 1 and session.report()["tuner"]["tries"] > 0
    model.close()
