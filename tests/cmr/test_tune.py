"""cmr tune: finds what is faster on made-up times, writes nothing for noise, and what it writes is read."""

import re
import tomllib

import numpy as np
import pytest
from tests.beside import PROMPTS, alone, answer, tiny
from tests.toy import MODEL

import cmr
from cmr.bench.tuning import EARLY_ROUNDS, LEAST_ROUNDS, PLAIN, Mix, Setting, candidates, search
from cmr.cli import tune
from cmr.cli.main import main
from cmr.profiles import read_profile

SINGLES = [
    Setting((("threads", 2),)), Setting((("threads", 1),)), Setting((("chunk", 128),)), Setting((("chunk", 256),)),
    Setting(plugins=("spec-lookup",)), Setting(plugins=("prefix-cache",)),
]  # fmt: skip


class Times:
    """Made-up seconds of a mix: `factors` by key and value multiply, a machine wanders, each measurement has noise."""

    def __init__(self, factors, noise=0.03, seed=0):
        self.factors, self.noise, self.rng = factors, noise, np.random.default_rng(seed)
        self.level, self.calls = 0.0, []

    def __call__(self, setting):
        self.calls.append(setting)
        self.level = 0.9 * self.level + 0.03 * self.rng.standard_normal()
        words = [*map(str, setting.plugins), *(f"{name}={value}" for name, value in setting.limits)]
        factor = np.prod(
            [self.factors.get(word, self.factors.get(word.partition(":")[0], 1.0)) for word in words]
        )
        return float(factor * np.exp(self.level + self.noise * self.rng.standard_normal()))


def test_changes_that_gain_are_found_and_put_together():
    right = 0
    for seed in range(20):
        times = Times({"threads=1": 0.8, "chunk=128": 0.9, "threads=2": 1.3, "spec-lookup": 1.2}, seed=seed)
        outcome = search(SINGLES, times, 120)
        right += outcome.winner is not None and outcome.winner.setting.keys >= {"threads", "chunk"}
        assert outcome.winner is None or outcome.winner.gain.low > 1
        assert {str(each.setting) for each in outcome.found} >= set(map(str, SINGLES))
    assert right >= 19


def test_noise_does_not_win():
    won = [search(SINGLES, Times({}, noise=0.1, seed=seed), 150).winner is not None for seed in range(40)]
    assert sum(won) <= 2


def test_what_is_slower_goes_early_and_plain_never():
    times = Times({"threads=2": 2.0, "chunk=256": 0.7})
    outcome = search(SINGLES, times, 60)
    rounds = {str(each.setting): len(each.seconds) for each in outcome.found}
    assert rounds["threads=2"] < rounds["chunk=256"] and str(outcome.winner.setting).startswith("chunk=256")
    assert len(outcome.plain.seconds) == len(outcome.winner.seconds) >= LEAST_ROUNDS
    assert times.calls.count(PLAIN) > len(outcome.plain.seconds) + len(outcome.again.seconds)


def test_time_is_kept_where_rounds_are_short_and_the_least_is_done_where_they_are_long():
    short, long = Times({}), Times({})
    search(SINGLES, lambda setting: 0.01 * short(setting), 5)
    search(SINGLES, lambda setting: 100 * long(setting), 5)
    assert 250 < len(short.calls) < 600
    stages = EARLY_ROUNDS * ((1 + 6) + (1 + 3))
    assert stages + 4 * LEAST_ROUNDS <= len(long.calls) <= stages + 5 * LEAST_ROUNDS


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_settings_are_a_search_too(count):
    outcome = search(SINGLES[:count], Times({"threads=2": 0.5}), 30)
    assert (outcome.winner is not None) == (count > 0)
    assert len({str(each.setting) for each in outcome.found}) == len(outcome.found)


def test_candidates_change_one_thing_each_and_leave_what_was_given():
    names = list(map(str, candidates(MODEL, ["spec-lookup:depth=3"])))
    assert names == ["chunk=256", "chunk=128", "prefix-cache"]  # numpy has no threads to choose


def test_a_setting_that_breaks_its_promise_is_named():
    class Lies:
        exact = True

        @cmr.hookimpl
        def on_logits(self, logits):
            logits[:, 5] = 1e9

    mix = Mix(MODEL, [[1, 2, 3]], 4, [], 512)
    assert mix(PLAIN) > 0 and mix(Setting((("chunk", 2),))) > 0
    mix.open = lambda setting: cmr.Session.open(MODEL, [Lies()])
    with pytest.raises(cmr.PluginError, match="lies gave other tokens than the plain run"):
        mix(Setting(plugins=("lies",)))


# -- the command --


def tuned(monkeypatch, tmp_path, factors, *flags):
    """Run the command with made-up times; its profile's path."""
    times = Times(factors, noise=0.003)
    monkeypatch.setattr(Mix, "__call__", lambda self, setting: times(setting))
    path = tmp_path / "found.toml"
    assert main(["tune", str(tiny().path), "-t", "2", "-o", str(path), "--seconds", "40", *flags]) == 0
    return path


def test_the_profile_is_read_with_its_figures_as_comments(monkeypatch, tmp_path, capsys):
    factors = {"threads=1": 0.7, "spec-lookup": 0.8, "chunk=128": 1.3}
    path = tuned(monkeypatch, tmp_path, factors, "--plugin", "stop-loop:times=5")
    out = capsys.readouterr().out
    assert "times as fast" in out and f"written to {path}" in out
    text = path.read_text()
    assert re.search(r"^# .*threads=1.*spec-lookup.*times the plain plan's speed", text)
    assert tomllib.loads(text) == {
        "threads": 1, "threads-batch": 2, "plugins": {"stop-loop": {"times": 5}, "spec-lookup": {}},
    }  # fmt: skip
    assert list(read_profile(path).plugins) == ["stop-loop", "spec-lookup"]
    model = cmr.open_model(tiny().path, threads=2)
    session = cmr.Session.open(model, profile=path)
    assert (model.ops.threads, model.ops.prompt_threads) == (1, 2)
    assert [answer(session, prompt) for prompt in PROMPTS[:2]] == alone([], PROMPTS[:2])
    model.close()


def test_nothing_is_written_where_nothing_wins(monkeypatch, tmp_path, capsys):
    path = tuned(monkeypatch, tmp_path, {"threads=1": 1.4, "spec-lookup": 1.1, "threads_batch=1": 1.2})
    assert not path.exists()
    assert "nothing is faster than the plain plan by more than the noise" in capsys.readouterr().out


def test_kv_in_fewer_bits_is_tried_under_a_bound_that_is_named(monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(PROMPTS[0] * 3)
    monkeypatch.setenv("CMR_CACHE", str(tmp_path))
    path = tuned(monkeypatch, tmp_path, {"kv-quant": 0.5}, "-f", str(text), "--kl", "0.05")
    assert "kv-quant" in read_profile(path).plugins
    path.unlink()
    assert not tuned(monkeypatch, tmp_path, {"kv-quant": 0.5}, "-f", str(text), "--kl", "1e-9").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kl", "0.1"], "--kl measures on a text; give one with -f FILE"),
        (["-n", "1000000"], "leave no room in a context of 1024"),
        (["-p", "x", "--plugin", "telemtry"], "did you mean 'telemetry'"),
        (["-f", "none.txt"], "none.txt cannot be read as text"),
        (["--seconds", "-1"], "wants 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, capsys):
    assert main(["tune", str(tiny().path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_real_search_ends_and_changes_no_token(tmp_path, capsys):
    path = tmp_path / "real.toml"
    flags = ["-t", "2", "-n", "8", "--seconds", "1", "-p", "Once upon a time", "-o", str(path)]
    assert main(["tune", str(tiny().path), *flags]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("plain", "threads=1", "chunk=128", "spec-lookup", "prefix-cache"))
    assert path.exists() == ("nothing is faster" not in out)
    assert len(tune.MIX) == 3
