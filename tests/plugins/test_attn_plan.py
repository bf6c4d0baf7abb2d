"""attn-plan: the choices that read least within the bound, each layer and band of positions by its own rule."""

import json

import numpy as np
import pytest
from tests.beside import BESIDE, STORY, alone, beside, tiny
from tests.tool_files import load_tool
from tests.toy import run

import cmr
from cmr.testing import ToyModel, check
from cmr_plugins.attn_plan import AttnPlan, choose, foreseen

LONG = (STORY * 4, STORY * 2 + "The cat " * 60)
CHOICES = ["full", "64+4", "16+4"]


def calibration(layers, kl, slots, lengths=(0, 200), **changes):
    found = {
        "model": "toy", "layers": layers, "width": 32, "lengths": list(lengths), "choices": CHOICES, "kl": kl,
        "slots": slots,
    }  # fmt: skip
    return found | changes


def written(tmp_path, found):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    return path


TOY = calibration(
    3,
    [[[0, 0, 0], [0.01, 0.02, 0.001], [0.2, 0.3, 0.004]]] * 2,
    [[1.0, 0.9, 0.8], [5.0, 2.0, 1.0]],
)


def test_what_reads_least_within_the_bound_is_chosen():
    """Against trying every combination: no affordable one reads much less (the greedy choice may miss a little)."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        kl = np.sort(rng.exponential(0.01, (1, 3, 4)), axis=1)
        kl[:, 0] = 0
        slots = np.sort(rng.random((1, 3)))[:, ::-1]
        found = calibration(4, kl.tolist(), slots.tolist(), lengths=[0])
        (names,) = choose(found, 0.02)
        assert foreseen(found, 0, names) <= 0.02 + 1e-12
        places = [CHOICES.index(name) for name in names]
        best = min(
            sum(slots[0][list(c)])
            for c in np.ndindex(3, 3, 3, 3)
            if sum(kl[0, p, i] for i, p in enumerate(c)) <= 0.02
        )
        assert sum(slots[0][places]) <= 1.25 * best
    assert choose(found | {"compound": [2.0]}, 0.02) == choose(found, 0.01)
    assert choose(found, 0.0) == [["full"] * 4]
    assert choose(found, 1e9) == [["16+4"] * 4]


class ByPosition:
    """The rules of the plan below, row by row."""

    @cmr.hookimpl
    def attention(self, layer):
        names = [["full", "64+4", "16+4"], ["16+4", "64+4", "64+4"]]
        rules = [
            cmr.AttnRule(*map(int, n[layer].split("+"))) if n[layer] != "full" else cmr.AttnRule()
            for n in names
        ]

        def attend(q, cache, q_pos, out, prompt):
            for i, p in enumerate(q_pos):
                cache.attend(q[i : i + 1], q_pos[i : i + 1], rules[int(p >= 50)], out[i : i + 1], prompt)

        return attend


def test_rows_obey_the_rule_of_their_layer_and_position(tmp_path):
    kl = [[[0, 0, 0], [9, 0.0, 0.0], [9, 9, 0.0]], [[0, 0, 0], [0.0, 0.0, 0.0], [0.0, 9, 9]]]
    found = calibration(3, kl, [[3.0, 2.0, 1.0]] * 2, lengths=[0, 50])
    plugin = AttnPlan(file=written(tmp_path, found), kl=0.1)
    assert plugin.chosen == [["full", "64+4", "16+4"], ["16+4", "64+4", "64+4"]]
    for prompt in ("abc", "a long story about a fox and a hen and a barn " * 4):
        assert run(plugin, prompt=prompt) == run(ByPosition(), prompt=prompt)


def test_with_nothing_to_spend_tokens_are_the_plain_runs(tmp_path):
    path = written(tmp_path, TOY)
    prompt = "a long story about a fox and a hen and a barn " * 6
    assert run(AttnPlan(file=path, kl=0.0), prompt=prompt) == run(prompt=prompt)
    assert run(AttnPlan(file=path, kl=9.0), prompt=prompt) != run(prompt=prompt)


def test_bands_that_agree_are_a_plain_rule(tmp_path):
    session = cmr.Session.open(ToyModel(), [AttnPlan(file=written(tmp_path, TOY), kl=9.0)])
    assert session.plan.attend[0].__self__ == cmr.AttnRule(window=16, sinks=4, scale=8**-0.5)
    assert session.report()["attn-plan"]["200"] == {"kl": 0.504, "layers": "16+4 16+4 16+4"}


def tiny_plan(tmp_path):
    config = tiny().config
    kl = np.zeros((2, 3, 6))
    kl[:, 2] = [[9, 0, 9, 0, 9, 0], [0, 9, 0, 9, 0, 9]]
    kl[:, 1] = [[9, 0, 9, 0, 9, 0], [0, 0, 0, 9, 0, 0]]
    found = calibration(6, kl.tolist(), [[3.0, 2.0, 1.0]] * 2, lengths=[0, 150])
    return written(tmp_path, found | {"model": config.name, "width": config.n_embd})


@pytest.mark.parametrize("other", BESIDE)
def test_beside(other, tmp_path):
    plugins = [f"attn-plan:file={tiny_plan(tmp_path)},kl=0.1"]
    assert beside(other, plugins, LONG) == alone(plugins, LONG) != alone([], LONG)


def test_another_model_is_refused_by_name(tmp_path):
    with pytest.raises(
        cmr.PluginError, match="was measured on toy .3 layers of width 32.*measure this model"
    ):
        cmr.Session.open(tiny(), [f"attn-plan:file={written(tmp_path, TOY)}"])


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "nonsense", json.dumps(TOY | {"kl": [[1]]}), json.dumps(TOY | {"choices": ["a"] * 3})],
)
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(cmr.PluginError, match="is no calibration file"):
        cmr.Session.open(ToyModel(), [f"attn-plan:file={path}"])
    with pytest.raises(cmr.PluginError, match="cannot be read"):
        cmr.Session.open(ToyModel(), [f"attn-plan:file={tmp_path / 'none'}"])


def test_contracts(tmp_path):
    path = written(tmp_path, TOY)
    assert [finding for finding in check(lambda: AttnPlan(file=path)) if not finding.holds] == []


def test_the_tool_writes_a_file_that_the_plugin_reads(tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text(STORY * 8)
    words = (
        f"plan {tiny().path} --text {text} -o {out} --lengths 60,150 --windows 16,64 --stretches 1".split()
    )
    monkeypatch.setattr("sys.argv", words)
    load_tool("plan_attention").main()
    assert capsys.readouterr().out.count("\n") == 2 + 3 * 2
    plugin = AttnPlan(file=out, kl=0.01)
    assert plugin.measured["lengths"] == [60, 150]
    kl = np.array(plugin.measured["kl"])
    assert (kl[:, 0] == 0).all() and kl[1, 1].sum() > kl[1, 2].sum() > 0
    assert len(alone([f"attn-plan:file={out}"], LONG)) == 2
