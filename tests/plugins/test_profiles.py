"""The profiles that have names: each opens, says what it is, and does what its sentence says."""

import pytest
from tests.beside import PROMPTS, alone, tiny

import cmr
from cmr.cli.main import main
from cmr.profiles import named_profiles, read_profile

NAMES = ["balanced", "long-context", "memory", "speed"]


def answers(profile, prompts=PROMPTS):
    session = cmr.Session.open(tiny(), profile=profile)
    found = []
    for prompt in prompts:
        text = session.text(prompt, max_tokens=24, temp=0.0, ignore_eos=True)
        list(text)
        found.append(text.seq.new)
    return found, session.report()


def test_there_are_those_four_and_each_has_a_sentence(capsys):
    assert list(named_profiles()) == NAMES
    assert all(about.endswith(".") and len(about) > 40 for about in named_profiles().values())
    assert main(["plugins"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--profile {name}\n  {about}\n" in shown for name, about in named_profiles().items())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_its_plugins_named_one_by_one(name):
    texts = []
    for plugin, options in read_profile(name).plugins.items():
        values = ",".join(f"{key}={value}" for key, value in options.items())
        texts.append(f"{plugin}:{values}" if values else plugin)
    assert answers(name)[0] == alone(texts)


def test_speed_is_exact():
    assert cmr.Session.open(tiny(), profile="speed").plan.exact
    assert answers("speed")[0] == alone([])


@pytest.mark.parametrize(("name", "share"), [("memory", 0.3), ("balanced", 0.55)])
def test_fewer_bits_take_the_share_of_memory_that_they_say(name, share):
    plain, less = (answers(profile, PROMPTS[2:3])[1]["kv_bytes"] for profile in (None, name))
    assert 0.8 * share < less / plain < share


def test_long_context_takes_less_memory_the_longer_it_is():
    model = cmr.open_model(tiny().path, threads=1, context=4096)
    prompt = model.tokenizer.encode(PROMPTS[0] * 30, bos=True)[:2600]
    held = []
    for profile in (None, "long-context"):
        session = cmr.Session.open(model, profile=profile)
        list(session.generate(session.request(prompt, max_tokens=2, temp=0.0)))
        held.append(session.report()["kv_bytes"])
    model.close()
    assert held[1] < 0.6 * held[0]


def test_a_name_that_is_none():
    with pytest.raises(cmr.PluginError, match="there is no profile 'memroy'; did you mean 'memory'"):
        read_profile("memroy")


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "memory").write_text("[plugins.stop-loop]\n")
    monkeypatch.chdir(tmp_path)
    assert list(read_profile("memory").plugins) == ["stop-loop"]
