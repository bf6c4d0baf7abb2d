"""cmr bench: which cases there are, how disturbed rounds are told, and how sure a ratio is."""

import numpy as np
import pytest

from cmr.bench.cases import Case, cases
from cmr.bench.figures import ratio, spread
from cmr.bench.quiet import Sample, Watch, busy_seconds, own_time
from cmr.bench.rounds import interleave

# -- cases --


def test_cases_are_every_combination_and_prompts_are_read_alone():
    found = [case.name for case in cases([512, 0], [128], [0, 64], [1, 8], [(16, 8)])]
    shallow = ["pp512", "tg128", "tg128 x8", "pp16+tg8"]
    assert found == shallow + [f"{name} @ d64" for name in shallow]


def test_a_case_counts_the_tokens_of_all_sequences():
    case = Case(0, 32, depth=100, parallel=4)
    assert (case.tokens, case.context) == (128, 132)


# -- statistics --


def test_spread_names_the_median_and_the_deviation_of_a_sample():
    found = spread([1.0, 2.0, 6.0])
    assert (found.median, found.mean, found.low, found.high) == (2, 3, 1, 6)
    assert found.stddev == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert spread([5.0]).stddev == 0


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        drift = rng.uniform(0.5, 2, 15)  # a machine that changes its speed slows both
        ours, theirs = (speed * drift * rng.lognormal(0, 0.05, 15) for speed in (130, 100))
        found = ratio(ours, theirs, resamples=300)
        held += found.low <= 1.3 <= found.high
        assert found.low <= found.value <= found.high
    assert held / 200 > 0.88


def test_equal_samples_have_a_ratio_without_doubt():
    assert ratio([2.0] * 5, [1.0] * 5) == (2, 2, 2)


# -- disturbance --


class Scripted:
    """A contender whose seconds are given; `busy` is what the machine's counter would say."""

    def __init__(self, name, seconds, busy=None, others=None):
        self.name, self.seconds, self.busy = name, seconds, busy
        self.others = iter(others or [])
        self.calls = []

    def prepare(self, case):
        self.calls.append("prepare")

    def measure(self, case, repeats):
        self.calls.append(repeats)
        if self.busy is not None:
            self.busy[0] += 1 + next(self.others, 0)
        return Sample(self.seconds, 1.0)

    def close(self):
        pass


def _watch(busy, limit=0.1):
    return Watch(limit, lambda: busy[0])


def test_time_of_others_is_what_is_left_of_the_machine():
    busy = [10.0]

    def measured():
        busy[0] += 3.0
        return Sample(0.5, 1.0)

    found = Watch(0.1, lambda: busy[0]).around(measured)
    assert found.others > 1000  # two seconds of others, in no time at all
    assert Watch(0.1, lambda: None).around(measured).others is None


def test_the_machine_counts_the_time_of_this_process():
    if busy_seconds() is None:
        pytest.skip("this system does not count processor time")
    before = busy_seconds()
    sample = own_time(lambda: sum(i * i for i in range(2_000_000)))
    assert busy_seconds() - before > 0.5 * sample.cpu - 0.05
    assert sample.cpu == pytest.approx(sample.seconds, rel=0.5) or sample.cpu < sample.seconds


def test_disturbed_rounds_are_measured_again():
    busy = [0.0]
    # The first call finds out how often to repeat; the first and third rounds are then disturbed.
    noisy = Scripted("a", 1.0, busy, others=[0, 5, 0, 5, 0, 0])
    found = interleave([noisy], Case(0, 8), 3, _watch(busy), settle=0, back_off=0)
    assert (len(found.kept), found.rejected, found.disturbed) == (3, 2, 0)


def test_the_least_disturbed_rounds_fill_up_and_are_counted():
    busy = [0.0]
    noisy = Scripted("a", 1.0, busy, others=[0, 9, 8, 0, 9, 9, 9])
    found = interleave([noisy], Case(0, 8), 3, _watch(busy), settle=0, back_off=0)
    assert (len(found.kept), found.rejected, found.disturbed) == (3, 3, 2)


def test_contenders_take_turns_and_short_ones_are_repeated_alike():
    a, b = Scripted("a", 1.0), Scripted("b", 0.05)
    found = interleave([a, b], Case(0, 8), 2, Watch(), settle=0)
    assert a.calls == b.calls == ["prepare", 1, 1, 1]
    assert (found.seconds(0), found.seconds(1)) == ([1.0] * 2, [0.05] * 2)
    short = Scripted("c", 0.05)
    interleave([short], Case(0, 8), 1, Watch(), settle=0)
    assert short.calls == ["prepare", 1, 4]


def test_roofs_are_taken_in_each_round():
    found = interleave([Scripted("a", 1.0)], Case(0, 8), 2, Watch(), lambda: {"read": 5.0}, settle=0)
    assert [each.roofs for each in found.kept] == [{"read": 5.0}] * 2
