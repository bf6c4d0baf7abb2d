"""Samplers against their definitions: exact candidates, probabilities, distributions of draws."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tests import sampling_reference as reference

from cmr.errors import ModelError, RequestError
from cmr.sampling import SAMPLERS, Sampler, SamplerSettings
from cmr.sampling.draws import uniform
from cmr.sampling.listing import best, holding, ordered, reaching

OFF = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}


def logits_of(seed, size, step=0.0):
    """Normal logits as float32; with a step they are rounded to its multiples, so that many are equal."""
    x = np.random.default_rng(seed).normal(0, 3, size)
    return (np.round(x / step) * step if step else x).astype(np.float32)


def distribution(x, history=(), index=0, tokenizer=None, **options):
    sampler = Sampler(SamplerSettings(**{**OFF, **options}), len(x), tokenizer)
    ids, probs = sampler.distribution(x, history, index)
    return dict(zip(ids.tolist(), probs.tolist()))


def check(found, wanted, x, rtol=1e-9):
    """Compare two distributions over x; which of several equal logits typical-p keeps is left open."""
    found = sorted((x[token], p) for token, p in found.items() if p > 1e-30)
    wanted = sorted((x[token], p) for token, p in wanted.items() if p > 1e-30)
    assert [logit for logit, _ in found] == [logit for logit, _ in wanted]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in wanted], rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 30, 333, 2500])
@pytest.mark.parametrize("step", [0.0, 0.5, 1e9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temp": 0.7},
        {"temp": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 2400},
        {"top_p": 0.8137},
        {"top_p": 0.0},
        {"top_p": 0.9993},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"typical_p": 0.3137},
        {"typical_p": 0.9993},
        {"top_n_sigma": 0.7},
        {"top_n_sigma": 2.0, "top_k": 40},
        {"temp": 1.1, "dynatemp_range": 0.4},
        {"temp": 0.5, "dynatemp_range": 0.6, "dynatemp_exponent": 1.7},
        {"temp": 0.8, "top_k": 40, "top_p": 0.95013, "min_p": 0.05},
        {"xtc_probability": 1.0, "xtc_threshold": 0.07},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    ],
    ids=str,
)
def test_candidates_and_probabilities(options, step, size):
    x = logits_of(3, size, step)
    wanted = reference.chain(x, SamplerSettings(**{**OFF, **options}), coin="xtc_probability" in options)
    check(distribution(x, **options), wanted, x)


@pytest.mark.parametrize("seed", range(200))
def test_any_settings_in_any_order(seed):
    rng = np.random.default_rng(seed)
    x = logits_of(seed, int(rng.integers(2, 400)), rng.choice([0.0, 0.25]))
    history = rng.integers(0, len(x), 80).tolist()
    options = {
        "temp": rng.uniform(0.3, 2),
        "top_k": int(rng.integers(0, 60)),
        "top_p": rng.uniform(0.3, 1.2),
        "min_p": rng.uniform(-0.1, 0.2),
        "typical_p": rng.uniform(0.3, 1.5),
        "top_n_sigma": rng.uniform(-2, 3),
        "xtc_probability": rng.choice([0.0, 0.5]),
        "xtc_threshold": rng.uniform(0, 0.4),
        "dynatemp_range": rng.uniform(-1, 1),
        "repeat_penalty": rng.uniform(0.9, 1.5),
        "presence_penalty": rng.choice([0.0, 0.7]),
        "frequency_penalty": rng.choice([0.0, -0.3, 0.3]),
        "repeat_last_n": int(rng.choice([0, 5, 64, -1])),
        "dry_multiplier": rng.choice([0.0, 0.8]),
        "dry_allowed_length": 0,
        "dry_sequence_breakers": (),
        "logit_bias": {0: 1.5, 1: -np.inf},
        "samplers": ";".join(rng.permutation(SAMPLERS)[: rng.integers(0, len(SAMPLERS) + 1)]),
    }
    for name, (low, high) in {"top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1)}.items():
        options[name] = float(np.clip(options[name], low, high))
    options["dynatemp_range"] = max(options["dynatemp_range"], 0.0)
    s = SamplerSettings(**{**OFF, **options})
    place = s.samplers.index("xtc") + 1 if "xtc" in s.samplers else 0
    coin = s.xtc_probability > 0 and uniform(1, 9, place) < s.xtc_probability
    found = distribution(x, history, index=9, **options)
    check(found, reference.chain(x, s, history, coin), x, rtol=2e-5)


def test_order_changes_the_result():
    x = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32))
    cut_first = distribution(x, top_p=0.69, temp=3.0, samplers="top_p;temperature")
    flat_first = distribution(x, top_p=0.69, temp=3.0, samplers="temperature;top_p")
    assert sorted(cut_first) == [0, 1]
    assert sorted(flat_first) == [0, 1, 2]


def test_a_sampler_that_is_not_named_does_nothing():
    x = logits_of(1, 50)
    assert len(distribution(x, top_k=3, samplers="temperature")) == 50
    check(distribution(x, temp=0.2, samplers=""), dict(enumerate(reference.softmax(x.astype(float)))), x)


# -- the selection of candidates


@given(st.integers(0, 2**32), st.integers(1, 3000), st.sampled_from([0.0, 0.5, 4.0]), st.data())
@settings(max_examples=150, deadline=None)
def test_best_is_the_head_of_a_full_sort(seed, size, step, data):
    row = logits_of(seed, size, step)
    forbidden = data.draw(st.integers(0, size))
    row[np.random.default_rng(seed).permutation(size)[:forbidden]] = -np.inf
    count = data.draw(st.integers(1, size + 5))
    full = np.lexsort((np.arange(size), -row))
    assert best(row, count).tolist() == full[:count].tolist()


@pytest.mark.parametrize("size", [10, 1024, 1025, 20000])
def test_both_ways_of_ordering_agree(size):
    row = logits_of(5, size, 0.5)
    row[::7] = -0.0
    row[1::7] = 0.0
    row[3::11] = -np.inf
    assert ordered(row, np.arange(size)).tolist() == np.lexsort((np.arange(size), -row)).tolist()


def test_reaching_rounds_its_floor_upwards():
    row = np.array([1.0, np.nextafter(np.float32(1), np.float32(2)), 0.5], np.float32)
    assert reaching(row, 1.0).tolist() == [1, 0]
    assert reaching(row, 1.0 + 1e-12).tolist() == [1]


@given(st.integers(0, 1000), st.integers(1, 3000), st.floats(0, 0.999))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_enough_and_not_one_too_many(seed, size, mass):
    row = logits_of(seed, size)
    p = reference.softmax(row.astype(np.float64))
    kept = holding(row, mass)
    assert p[kept].sum() >= mass - 1e-9
    assert len(kept) == 1 or p[kept[:-1]].sum() < mass + 1e-9
    assert p[kept].min() >= np.delete(p, kept).max(initial=0)


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(1, 400), st.floats(0.01, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_limits_hold_together(seed, size, k, mass, share):
    found = distribution(logits_of(seed, size), top_k=k, top_p=mass, min_p=share, typical_p=0.9)
    assert 1 <= len(found) <= min(k, size)
    assert abs(sum(found.values()) - 1) < 1e-9
    assert min(found.values()) >= share * max(found.values()) * (1 - 1e-6)


# -- draws


def draws(x, count, history=(), **options):
    sampler = Sampler(SamplerSettings(**{**OFF, **options}), len(x))
    return [sampler.sample(x.copy(), history, index) for index in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temp": 0.8, "top_k": 9, "top_p": 0.95013, "min_p": 0.05},
        {"typical_p": 0.7},
        {"temp": 1.5, "top_n_sigma": 1.5},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options):
    x = logits_of(11, 12)
    wanted = reference.chain(x, SamplerSettings(**{**OFF, **options}))
    wanted = {token: p for token, p in wanted.items() if p > 0}
    tokens = draws(x, 20000, **options)
    assert set(tokens) <= wanted.keys()
    counts = [tokens.count(token) for token in wanted]
    assert chisquare(counts, np.array(list(wanted.values())) * len(tokens)).pvalue > 1e-3


def test_xtc_mixes_two_distributions():
    x = np.log(np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05], np.float32))
    options = {"xtc_probability": 0.3, "xtc_threshold": 0.15}
    s = SamplerSettings(**{**OFF, **options})
    plain, cut = reference.chain(x, s), reference.chain(x, s, coin=True)
    assert cut.keys() < plain.keys()
    tokens = draws(x, 30000, **options)
    wanted = np.array([0.7 * plain[t] + 0.3 * cut.get(t, 0.0) for t in plain])
    assert chisquare([tokens.count(t) for t in plain], wanted * len(tokens)).pvalue > 1e-3


@pytest.mark.parametrize("varied", ["seed", "index", "draw"])
def test_uniform_is_uniform_along_each_argument(varied):
    place = {"seed": 7, "index": 7, "draw": 1}
    u = np.array([uniform(**{**place, varied: i}) for i in range(40000)])
    assert u.min() >= 0 and u.max() < 1
    assert chisquare(np.histogram(u, 64, (0, 1))[0]).pvalue > 1e-3
    pairs = np.histogram2d(u[:-1:2], u[1::2], 16, [[0, 1], [0, 1]])[0]
    assert chisquare(pairs.ravel()).pvalue > 1e-3
    low_bits = (u * 2**53).astype(np.int64) & 255
    assert chisquare(np.bincount(low_bits, minlength=256)).pvalue > 1e-3


def test_no_two_places_share_a_draw():
    u = {uniform(seed, index, draw) for seed in range(10) for index in range(500) for draw in range(3)}
    assert len(u) == 15000


def test_draws_of_one_token_are_independent():
    u = np.array([[uniform(3, i, 0), uniform(3, i, 1)] for i in range(20000)])
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.03
    assert chisquare(np.histogram2d(*u.T, 16, [[0, 1], [0, 1]])[0].ravel()).pvalue > 1e-3


def test_a_draw_depends_on_seed_and_index_only():
    x = logits_of(4, 100)
    first = Sampler(SamplerSettings(seed=5), 100)
    tokens = [first.sample(x.copy(), [], i) for i in range(50)]
    again = Sampler(SamplerSettings(seed=5), 100)
    assert [again.sample(x.copy(), [1, 2], i) for i in reversed(range(50))] == tokens[::-1]
    other = Sampler(SamplerSettings(seed=6), 100)
    assert [other.sample(x.copy(), [], i) for i in range(50)] != tokens
    assert len(set(tokens)) > 1


# -- greedy


def test_greedy_takes_the_lowest_of_equal_maxima():
    x = np.array([0, 3, 1, 3, 3], np.float32)
    assert Sampler(SamplerSettings(temp=0), 5).sample(x, [], 0) == 1
    assert Sampler(SamplerSettings(temp=-1, top_k=1, dynatemp_range=1), 5).sample(x, [], 0) == 1
    assert Sampler(SamplerSettings(temp=0, samplers="top_k"), 5).sample(x, [], 0) == 1


@pytest.mark.parametrize("cold", [1e-30, 1e-5])
def test_a_cold_temperature_is_greedy(cold):
    x = logits_of(8, 60) * 100
    assert set(draws(x, 20, temp=cold)) == {int(x.argmax())}


def test_a_cold_dynamic_temperature_takes_the_best():
    x = np.array([5000, 0, -5000], np.float32)
    assert distribution(x, temp=0.5, dynatemp_range=0.5)[0] == 1.0


def test_greedy_obeys_what_can_change_the_best_token():
    x = np.array([3.0, 2.9, 1.0, 0.0], np.float32)
    assert distribution(x, [0], temp=0, repeat_penalty=2.0) == {1: 1.0}
    assert distribution(x, temp=0, logit_bias={3: 9.0}) == {3: 1.0}
    assert distribution(x, temp=0, xtc_probability=1.0, xtc_threshold=0.1) == {1: 1.0}
    assert distribution(x, [0], temp=0, repeat_penalty=9, samplers="temperature;penalties") == {0: 1.0}
    first = "temperature;xtc;penalties"
    assert distribution(x, [0], temp=0, xtc_probability=1.0, repeat_penalty=9, samplers=first) == {0: 1.0}


# -- bias, refusals


def test_logit_bias_forbids_and_forces():
    x = logits_of(2, 30)
    top = int(x.argmax())
    assert top not in set(draws(x, 300, logit_bias={top: -np.inf}))
    assert set(draws(x, 50, logit_bias={4: 200.0})) == {4}
    with pytest.raises(RequestError, match="token 30"):
        Sampler(SamplerSettings(logit_bias={30: 1.0}), 30)


@pytest.mark.parametrize("options", [{"temp": 0}, {}, {"mirostat": 2}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_refused(options, value):
    x = logits_of(2, 30)
    x[17] = value
    with pytest.raises(ModelError, match="17.*(nan|inf)"):
        Sampler(SamplerSettings(**options), 30).sample(x, [], 0)


@pytest.mark.parametrize("options", [{"temp": 0}, {}, {"top_k": 0, "top_p": 1, "min_p": 0}], ids=str)
def test_no_token_left_is_refused(options):
    with pytest.raises(RequestError, match="no token is left"):
        Sampler(SamplerSettings(**options), 30).sample(np.full(30, -np.inf, np.float32), [], 0)
    bias = dict.fromkeys(range(30), -np.inf)
    with pytest.raises(RequestError, match="no token is left"):
        Sampler(SamplerSettings(**options, logit_bias=bias), 30).sample(logits_of(1, 30), [], 0)


def test_one_token_left_is_taken():
    x = np.full(500, -np.inf, np.float32)
    x[321] = -4
    assert set(draws(x, 10, temp=0.8, top_k=40, top_p=0.9, min_p=0.05, typical_p=0.9)) == {321}


# -- cost


def test_a_read_only_row_and_other_types_serve_as_well():
    x = logits_of(2, 700)
    wanted = draws(x, 20, temp=0.8, top_k=40)
    sampler = Sampler(SamplerSettings(**{**OFF, "temp": 0.8, "top_k": 40}), 700)
    frozen = x.copy()
    frozen.flags.writeable = False
    for row in (frozen, x.astype(np.float64), np.repeat(x, 2)[::2]):
        assert [sampler.sample(row, [], i) for i in range(20)] == wanted
    with pytest.raises(ValueError, match="shape"):
        sampler.sample(x[:5], [], 0)


def test_distribution_leaves_the_logits_alone():
    x = logits_of(2, 700)
    before = x.copy()
    distribution(x, [1, 2, 3], repeat_penalty=1.3, top_n_sigma=1.0, logit_bias={3: 1.0})
    assert (x == before).all()


def test_no_token_costs_memory_in_proportion_to_the_vocabulary():
    x = logits_of(1, 128000)
    sampler = Sampler(SamplerSettings(repeat_penalty=1.1), 128000)
    history = list(range(3000))
    sampler.sample(x, history, 0)
    tracemalloc.start()
    for index in range(5):
        sampler.sample(x, history, index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


PROGRAM = """
import sys
sys.modules.update({blocked})
import numpy as np
from cmr.sampling import Sampler, SamplerSettings
x = np.random.default_rng(1).normal(0, 3, 500).astype(np.float32)
greedy = Sampler(SamplerSettings(temp=0, repeat_penalty=1.2), 500)
greedy.sample(x.copy(), [1, 2], 0)
print("numba" in sys.modules and sys.modules["numba"] is not None)
options = dict(seed=3, typical_p=0.95, xtc_probability=0.3, dynatemp_range=0.2, dry_multiplier=0.5)
some = Sampler(SamplerSettings(**options, dry_sequence_breakers=()), 500)
print([some.sample(x.copy(), [1, 2, 3, 1, 2], i) for i in range(30)])
"""


def test_greedy_never_loads_the_compiler_and_without_it_the_tokens_are_the_same():
    def output(blocked):
        command = [sys.executable, "-c", PROGRAM.replace("{blocked}", blocked)]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    compiled, plain = output("{}"), output('{"numba": None}')
    assert compiled[0] == plain[0] == "False"
    assert compiled[1] == plain[1]
