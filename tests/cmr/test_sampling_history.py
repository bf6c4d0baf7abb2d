"""Samplers that look back or carry state: penalties, DRY with its breakers, mirostat."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import sampling_reference as reference

from cmr.errors import RequestError
from cmr.ops.sample import kernel
from cmr.sampling import Sampler, SamplerSettings
from cmr.sampling.history import breakers

OFF = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}


class Letters:
    """A tokenizer whose tokens are given texts; encoding takes the longest that fits."""

    def __init__(self, *texts):
        self.texts = texts

    def piece(self, token):
        return self.texts[token].encode()

    def encode(self, text):
        ids = []
        while text:
            fits = max((t for t in self.texts if text.startswith(t)), key=len)
            ids.append(self.texts.index(fits))
            text = text[len(fits) :]
        return ids


def drops(history, tokenizer=None, size=10, **options):
    """How far each token's logit falls, for those that do."""
    x = np.linspace(1, 2, size).astype(np.float32)
    s = SamplerSettings(**{**OFF, "dry_sequence_breakers": (), **options})
    ids, probs = Sampler(s, size, tokenizer).distribution(x, history, 0)
    plain = Sampler(SamplerSettings(**OFF), size).distribution(x, history, 0)[1]
    change = np.log(plain) - np.log(probs[np.argsort(ids)])
    change -= change.min()
    return {i: round(float(c), 4) for i, c in enumerate(change) if c > 1e-4}


@given(
    st.lists(st.integers(0, 11), max_size=90),
    st.sampled_from([0, 1, 5, 64, 500, -1]),
    st.floats(0.5, 2),
    st.floats(-1, 1),
    st.floats(-1, 1),
)
@settings(max_examples=150, deadline=None)
def test_penalties_against_the_definition(history, last_n, repeat, presence, frequency):
    x = np.linspace(-2, 2, 12).astype(np.float32)
    options = {"repeat_penalty": repeat, "presence_penalty": presence, "frequency_penalty": frequency}
    s = SamplerSettings(**{**OFF, **options, "repeat_last_n": last_n})
    wanted = reference.chain(x, s, history)
    ids, probs = Sampler(s, 12).distribution(x, history, 0)
    np.testing.assert_allclose(probs, [wanted[i] for i in ids], rtol=1e-5)


def test_only_the_last_tokens_count():
    history = [1, 1, 2, 3]
    assert drops(history, presence_penalty=0.5, repeat_last_n=2) == {2: 0.5, 3: 0.5}
    assert drops(history, frequency_penalty=0.5, repeat_last_n=-1) == {1: 1.0, 2: 0.5, 3: 0.5}
    assert drops(history, frequency_penalty=0.5, repeat_last_n=0) == {}
    assert drops(np.array(history, np.int32), frequency_penalty=0.5) == {1: 1.0, 2: 0.5, 3: 0.5}


def test_tokens_beyond_the_vocabulary_are_passed_over():
    history = [-1, 99, 3, 4, 99, 3]
    assert drops(history, presence_penalty=0.5) == {3: 0.5, 4: 0.5}
    assert drops(history, dry_multiplier=1.0, dry_allowed_length=2) == {4: 1.0}


# -- DRY


def test_dry_grows_with_the_passage():
    dry = {"dry_multiplier": 1.0, "dry_base": 2.0}
    assert drops([1, 2, 3, 9, 1, 2], **dry) == {3: 1.0}
    assert drops([0, 1, 2, 3, 9, 0, 1, 2], **dry) == {3: 2.0}
    assert drops([5, 0, 1, 2, 3, 9, 5, 0, 1, 2], **dry) == {3: 4.0}
    assert drops([1, 2, 3, 9, 7, 2], **dry) == {}
    assert drops([1, 2, 3, 9, 1, 2], **dry, dry_allowed_length=3) == {}
    assert drops([1, 2, 3, 9, 1, 2], **dry, dry_penalty_last_n=4) == {}


def test_dry_takes_the_longest_passage_for_a_token():
    assert drops([1, 2, 3, 0, 1, 2, 3, 8, 0, 1, 2], dry_multiplier=1.0, dry_base=2.0) == {3: 2.0}


def test_dry_stops_growing_before_floats_end():
    assert drops([1] * 400, dry_multiplier=1e-38, dry_base=2.0) == {1: round(1e-38 * 2.0**127, 4)}
    assert drops([1] * 400, dry_multiplier=0.5, dry_base=1.0) == {1: 0.5}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 3), st.sampled_from([-1, 7, 30]))
@settings(max_examples=200, deadline=None)
def test_dry_against_the_definition(history, allowed, last_n):
    x = np.linspace(1, 2, 5).astype(np.float32)
    options = {
        "dry_multiplier": 0.1,
        "dry_base": 1.1,
        "dry_allowed_length": allowed,
        "dry_penalty_last_n": last_n,
    }
    s = SamplerSettings(**{**OFF, **options, "dry_sequence_breakers": ("e", "cd")})
    wanted = reference.chain(x, s, history, breakers=[(4,), (2, 3)])
    ids, probs = Sampler(s, 5, Letters(*"abcde")).distribution(x, history, 0)
    np.testing.assert_allclose(probs, [wanted[i] for i in ids], rtol=1e-5)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=80), st.integers(0, 90))
@settings(max_examples=200, deadline=None)
def test_repeats_against_comparing_every_pair(tail, limit):
    lengths = np.zeros(len(tail), np.int32)
    kernel("repeats")(np.array(tail, np.int32), limit, lengths)
    for k in range(1, len(tail)):
        size = 0
        while size + k < len(tail) and tail[-1 - size] == tail[-1 - k - size]:
            size += 1
        assert lengths[k] == min(size, limit)


def test_breakers_are_found_whole_at_the_end_and_in_part():
    words = Letters("a", "\n", "x\n", "yen", "end", "d", "e", "nd", "n")
    found = breakers(("\n", "end"), words, 9)
    assert found == {1: {()}, 2: {()}, 3: {(5,)}, 4: {()}, 6: {(7,)}}


def test_a_breaker_ends_a_passage_and_is_never_penalized():
    words = Letters("a", "b", "c", "d", "\n", "f", "g", "h", "i", "j")
    dry = {"dry_multiplier": 1.0, "dry_base": 2.0, "tokenizer": words, "dry_sequence_breakers": ("\n",)}
    assert drops([0, 1, 2, 3, 9, 0, 1, 2], **dry) == {3: 2.0}
    assert drops([0, 4, 1, 2, 3, 9, 0, 4, 1, 2], **dry) == {3: 1.0}
    assert drops([0, 1, 2, 4, 9, 0, 1, 2], **dry) == {}


def test_dry_with_breakers_needs_a_tokenizer():
    with pytest.raises(RequestError, match="tokenizer"):
        Sampler(SamplerSettings(dry_multiplier=1.0), 10)
    Sampler(SamplerSettings(dry_multiplier=1.0, dry_sequence_breakers=()), 10)


# -- mirostat


@pytest.mark.parametrize("mu", [0.5, 3.0, 9.0])
@pytest.mark.parametrize("heat", [1.0, 0.6])
@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_candidates(version, heat, mu):
    x = np.sort(np.random.default_rng(2).normal(0, 3, 400))[::-1].astype(np.float32)
    sampler = Sampler(SamplerSettings(seed=1, temp=heat, mirostat=version), 400)
    sampler.restore(mu)
    ids, probs = sampler.distribution(x, [], 0)
    scaled = (x / np.float32(heat)).astype(np.float64)
    if version == 1:
        wanted, kept = reference.mirostat_1(np.arange(400), scaled, mu, 400)
    else:
        wanted, kept = reference.mirostat_2(np.arange(400), scaled, mu)
    assert ids.tolist() == wanted.tolist()
    np.testing.assert_allclose(probs, reference.softmax(kept), rtol=1e-9)


@pytest.mark.parametrize("row", [[1.0], [1.0, 1.0, 1.0], [3.0, -np.inf, -np.inf]], ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_on_degenerate_rows(version, row):
    sampler = Sampler(SamplerSettings(seed=1, mirostat=version), len(row))
    for index in range(50):
        token = sampler.sample(np.array(row, np.float32), [], index)
        assert row[token] > -np.inf


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("target", [2.0, 4.0])
def test_mirostat_reaches_its_target(version, target):
    rng = np.random.default_rng(0)
    sampler = Sampler(SamplerSettings(seed=1, temp=1.0, mirostat=version, mirostat_ent=target), 2000)
    surprises = []
    for index in range(1500):
        x = (-1.1 * np.log(np.arange(1, 2001)) + rng.normal(0, 0.1, 2000)).astype(np.float32)
        before = sampler.snapshot()
        ids, probs = sampler.distribution(x, [], index)
        assert sampler.snapshot() == before
        token = sampler.sample(x, [], index)
        p = probs[ids.tolist().index(token)]
        surprises.append(-np.log2(p))
        assert sampler.snapshot() == pytest.approx(before - 0.1 * (surprises[-1] - target))
    assert abs(np.mean(surprises[300:]) - target) < 0.1


def test_mirostat_goes_back_to_a_snapshot():
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 3, (30, 100)).astype(np.float32)
    sampler = Sampler(SamplerSettings(seed=1, mirostat=2), 100)
    states, tokens = [], []
    for index, row in enumerate(rows):
        states.append(sampler.snapshot())
        tokens.append(sampler.sample(row.copy(), [], index))
    sampler.restore(states[10])
    assert sampler.snapshot() == states[10]
    assert [sampler.sample(rows[i].copy(), [], i) for i in range(10, 30)] == tokens[10:]
    assert len(set(states)) == 30


def test_other_samplers_carry_no_state():
    sampler = Sampler(SamplerSettings(), 10)
    assert sampler.snapshot() is None
    sampler.restore(None)
