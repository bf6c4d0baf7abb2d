"""early-exit: the exit's predictions where it is sure, the full model's elsewhere, and no holes in the caches."""

from contextlib import closing

import numpy as np
import pytest
from tests.beside import BESIDE, PROMPTS, STORY, alone, beside, tiny
from tests.toy import MODEL

import cmr
from cmr.eval import Following, divergence_at_depth
from cmr.testing import check
from cmr_plugins.early_exit import EarlyExit

TEXT = tiny().tokenizer.encode(STORY * 7, bos=True)
SOME = "early-exit:sure=0.5"


class FirstLayers:
    """The model without its last layers."""

    @cmr.hookimpl
    def layer_order(self, model):
        return [0, 1]


def rows(plugins, n_prompt=60, count=40):
    session = cmr.Session.open(tiny(), plugins)
    with closing(Following(session, TEXT[: n_prompt + count + 1], n_prompt)) as follower:
        found = np.array([follower.row() for _ in range(count)])
        return found, follower.seq.caches, session


def probabilities(logits):
    return np.exp(logits - logits.max(-1, keepdims=True)).max(-1) / np.exp(
        logits - logits.max(-1, keepdims=True)
    ).sum(-1)


def test_an_exit_that_is_always_taken_is_the_model_without_the_other_layers():
    found, _, _ = rows(["early-exit:sure=0,after=[2]"])
    cut, _, _ = rows([FirstLayers()])
    full, _, _ = rows([])
    assert np.array_equal(found[1:], cut[1:])
    assert np.array_equal(found[0], full[0])  # the prompt's last row goes through all layers
    assert not np.array_equal(found[1], full[1])


def test_an_exit_is_taken_where_it_is_sure_and_only_there():
    found, _, session = rows(["early-exit:sure=0.4,after=[2]"])
    exits, _, _ = rows([FirstLayers()])
    taken = (found[1:] == exits[1:]).all(1)
    assert np.array_equal(taken, probabilities(exits[1:]) >= 0.4)
    assert 0 < taken.sum() < len(taken)
    report = session.report()["early-exit"]
    assert report["left_after"] == {"2": taken.sum()} and report["layers_left_out"] == 4 * taken.sum()


def test_nothing_is_left_out_where_nothing_is_sure():
    found, _, session = rows(["early-exit:sure=1"])
    assert np.array_equal(found, rows([])[0])
    assert session.report()["early-exit"]["layers_left_out"] == 0


def test_no_cache_has_holes():
    _, caches, session = rows([SOME])
    assert session.report()["early-exit"]["layers_left_out"] > 20
    for cache in caches:
        assert np.array_equal(cache.positions, np.arange(len(caches[0])))


@pytest.mark.parametrize("other", BESIDE)
def test_beside(other):
    assert beside(other, [SOME]) == alone([SOME])


def test_rows_that_leave_do_not_change_those_that_stay():
    assert alone([SOME]) != alone(["early-exit:sure=0"])
    assert beside("batching", ["early-exit:sure=0.3"]) == alone(["early-exit:sure=0.3"])


def test_surer_is_closer():
    values = {
        sure: divergence_at_depth(
            tiny(), [f"early-exit:sure={sure}"], TEXT, 128, 64, stretches=2
        ).divergence.mean
        for sure in (0.0, 0.5, 0.9)
    }
    assert values[0.0] > 2 * values[0.5] > 2 * values[0.9] > 0
    assert values[0.5] < 0.5


@pytest.mark.parametrize(
    "options, message",
    [("after=[3]", "not trained to end after layer 3; it was for: 2, 4"), ("sure=1.5", "0 to 1")],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(cmr.PluginError, match=message):
        cmr.Session.open(tiny(), [f"early-exit:{options}"])


def test_other_models_are_refused_by_name():
    with pytest.raises(cmr.PluginError, match=r"early-exit is for models trained to end early.*toy"):
        cmr.Session.open(MODEL, ["early-exit"])


def test_contracts():
    found = check(lambda: EarlyExit(sure=0.5), tiny())
    assert [finding for finding in found if not finding.holds] == []


def test_prompts_are_long_enough_to_leave_early():
    assert min(len(answer) for answer in alone([SOME], PROMPTS)) == 24
