"""The settings of sampling: defaults, ranges, spellings and refusals."""

import subprocess
import sys

import numpy as np
import pytest

from cmr.errors import RequestError
from cmr.sampling import SAMPLERS, Sampler, SamplerSettings, parse_logit_bias


def test_defaults_are_those_of_llama_cpp():
    s = SamplerSettings()
    assert (s.temp, s.top_k, s.top_p, s.min_p, s.typical_p, s.top_n_sigma) == (0.8, 40, 0.95, 0.05, 1.0, -1.0)
    assert (s.repeat_penalty, s.repeat_last_n, s.presence_penalty, s.frequency_penalty) == (1.0, 64, 0.0, 0.0)
    assert (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n) == (0.0, 1.75, 2, -1)
    assert s.dry_sequence_breakers == ("\n", ":", '"', "*")
    assert (s.xtc_probability, s.xtc_threshold, s.dynatemp_range, s.dynatemp_exponent) == (0.0, 0.1, 0.0, 1.0)
    assert (s.mirostat, s.mirostat_ent, s.mirostat_lr) == (0, 5.0, 0.1)
    assert ";".join(s.samplers) == "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature"


@pytest.mark.parametrize(
    "name, value",
    [
        ("temp", float("nan")),
        ("temp", "warm"),
        ("top_k", -2),
        ("top_k", 4.0),
        ("top_k", True),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("min_p", 2),
        ("typical_p", -1),
        ("top_n_sigma", float("inf")),
        ("xtc_probability", 1.5),
        ("xtc_threshold", -0.5),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1.0),
        ("repeat_last_n", -2),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", None),
        ("dry_multiplier", -0.1),
        ("dry_base", 0.5),
        ("dry_allowed_length", -1),
        ("dry_penalty_last_n", -5),
        ("dry_sequence_breakers", ("",)),
        ("dry_sequence_breakers", "\n"),
        ("dynatemp_range", -1),
        ("dynatemp_exponent", -0.5),
        ("mirostat", 3),
        ("mirostat_ent", -1),
        ("mirostat_lr", -0.1),
        ("seed", -2),
        ("seed", 2**64),
        ("seed", 0.5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name):
        SamplerSettings(**{name: value})
    s = SamplerSettings()
    setattr(s, name, value)
    with pytest.raises(RequestError, match=name):
        Sampler(s, 10)


@pytest.mark.parametrize(
    "message",
    [
        "top_p is 1.5; it must be a number between 0 and 1",
        "top_k is -7; it must be a whole number of at least -1",
    ],
)
def test_a_refusal_says_what_would_work(message):
    name, value = message.split(";")[0].split(" is ")
    with pytest.raises(RequestError) as caught:
        SamplerSettings(**{name: float(value) if "." in value else int(value)})
    assert str(caught.value) == message


@pytest.mark.parametrize("name, near", [("topk", "top_k"), ("tempreature", "temperature"), ("minp", "min_p")])
def test_an_unknown_sampler_gets_a_suggestion(name, near):
    with pytest.raises(RequestError, match=f"sampler '{name}' is not known; did you mean '{near}'"):
        SamplerSettings(samplers=f"penalties;{name}")


def test_an_unknown_sampler_unlike_any_gets_the_list():
    with pytest.raises(RequestError, match="there are: penalties, dry, "):
        SamplerSettings(samplers="qqqq")


def test_samplers_take_other_spellings():
    assert SamplerSettings(samplers=" top-k ;nucleus;Typical-P;temp;").samplers == (
        "top_k",
        "top_p",
        "typ_p",
        "temperature",
    )
    assert SamplerSettings(samplers=["dry", "xtc"]).samplers == ("dry", "xtc")
    assert SamplerSettings(samplers="").samplers == ()
    assert SamplerSettings(samplers=";".join(SAMPLERS)).samplers == SAMPLERS


def test_a_random_seed_is_settled_once():
    s = SamplerSettings()
    seed = s.seed
    assert isinstance(seed, int) and 0 <= seed < 2**32
    Sampler(s, 10)
    assert s.seed == seed
    assert len({SamplerSettings(seed=-1).seed for _ in range(8)}) > 1
    assert SamplerSettings(seed=2**64 - 1).seed == 2**64 - 1


def test_numbers_of_numpy_are_numbers():
    s = SamplerSettings(top_k=np.int64(3), temp=np.float32(0.5), logit_bias={np.int32(4): np.float64(1)})
    assert (s.top_k, s.temp, s.logit_bias) == (3, 0.5, {4: 1.0})


def test_idle_names_what_does_nothing():
    assert SamplerSettings().idle() == []
    assert SamplerSettings(dry_multiplier=1.0, samplers="top_k").idle() == ["dry_multiplier"]
    assert SamplerSettings(mirostat=2, repeat_penalty=1.1, temp=0.5, top_k=5).idle() == [
        "top_k",
        "repeat_penalty",
    ]
    assert SamplerSettings(temp=0.5, samplers="top_k").idle() == ["temp"]
    assert SamplerSettings(temp=0, samplers="top_k").idle() == []


@pytest.mark.parametrize(
    "text, token, bias",
    [("15043+1", 15043, 1.0), ("15043-2.5", 15043, -2.5), ("7-inf", 7, -np.inf), ("7+1e-3", 7, 0.001)],
)
def test_logit_bias_as_text(text, token, bias):
    assert parse_logit_bias(text) == (token, bias)


@pytest.mark.parametrize("text", ["", "5", "+5", "a+1", "5+b", "5+inf", "5+nan", "5.5+1"])
def test_logit_bias_as_bad_text(text):
    with pytest.raises(RequestError, match="logit.bias"):
        parse_logit_bias(text)


def test_importing_needs_no_compiler():
    program = "import sys, cmr.sampling; sys.exit('numba' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )
