"""The contracts find the plugins that break them, and only these."""

import numpy as np
import pytest
from tests.toy import Copies, Sees, Together

from cmr import LayerCache, hookimpl, plugin
from cmr.testing import ToyModel, check


@plugin
class Quiet:
    """Do nothing."""

    exact = True
    level: int = 1

    @hookimpl
    def on_step(self, step):
        pass


def broken(cls, **options):
    """The contracts that a plugin class breaks, by name, with the reasons."""
    return {finding.contract: finding.why for finding in check(cls, **options) if not finding.holds}


@pytest.mark.parametrize("cls", [Quiet, Copies, Together])
def test_a_good_plugin_breaks_none(cls):
    assert set(broken(cls)) <= ({"is described"} if cls is Sees else set())
    assert len(check(cls)) == 8


def test_every_contract_says_what_it_checks():
    from cmr.testing import Contracts

    for _, run in Contracts(Quiet).every():
        assert run.__doc__.endswith(".")


def test_a_plugin_that_says_nothing_about_itself():
    class Silent:
        @hookimpl
        def on_step(self):
            pass

    assert "has no docstring" in broken(Silent)["is described"]

    class Vague(Silent):
        """Say half."""

    assert "does not declare exact" in broken(Vague)["is described"]
    Vague.exact = "yes"
    assert "exact is 'yes', expected one like False" in broken(Vague)["is described"]


def test_a_plugin_that_is_less_exact_than_it_says():
    class Nudges(Quiet):
        @hookimpl
        def on_logits(self, seq, draft, logits):
            logits[:, 40] += 2.0

    assert "the plain run" in broken(Nudges)["is exact"]
    Nudges.exact = False
    assert broken(Nudges) == {}


def test_an_answer_may_end_sooner_for_a_reason_of_the_plugins_own():
    class Short(Quiet):
        @hookimpl
        def on_token(self, seq, token):
            return "short" if seq.n_new == 6 else None

    assert broken(Short) == {}


def test_a_plugin_whose_requests_disturb_each_other():
    class Remembers(Quiet):
        exact = False
        count = 0

        @hookimpl
        def on_logits(self, seq, draft, logits):
            logits[:, self.count % 90] += 50.0

        @hookimpl
        def on_token(self, seq, token):
            self.count += 1

    found = broken(Remembers)
    assert "by turns" in found["keeps requests apart"] and "alone" in found["keeps requests apart"]
    assert "then" in found["repeats itself"] and "after a cancelled request" in found["survives cancelling"]


def test_a_plugin_with_a_cache_that_breaks_the_laws():
    class Forgetful(LayerCache):
        def snapshot(self):
            return {**super().snapshot(), "k": [np.zeros_like(a) for a in super().snapshot()["k"]]}

    class Mine(Quiet):
        @hookimpl
        def kv_cache(self, model, layer):
            return Forgetful.factory(model, layer)

    assert "does not hold what the cache held" in broken(Mine)["keeps cache laws"]


def test_a_report_that_cannot_be_printed_as_json():
    class Reports(Quiet):
        @hookimpl
        def report(self):
            return {"array": np.zeros(3)}

    assert "not JSON serializable" in broken(Reports)["reports"]


def test_a_plugin_that_fails_is_named():
    class Fails(Quiet):
        @hookimpl
        def on_token(self):
            raise LookupError("nothing")

    found = broken(Fails)
    assert found["is exact"] == "fails failed in on_token: LookupError: nothing"
    assert "keeps cache laws" not in found


def test_options_and_other_models_work():
    assert broken("stop-loop:times=3", model=ToyModel(seed=3, n_layers=2)) == {}


def test_the_toys_rows_depend_on_their_role():
    from tests.toy import PROMPT, answer

    from cmr import Session

    model = ToyModel()
    session = Session.open(model)
    tokens = answer(session, PROMPT, max_tokens=24)
    everything = model.tokenizer.encode(PROMPT) + tokens
    again = [answer(session, everything[:n], max_tokens=1)[0] for n in range(len(PROMPT), len(everything))]
    assert again != tokens  # as prompts, its own tokens lead elsewhere
