"""prefix-cache says why a prompt was not reused, keeps keys apart, and takes or refuses other caches."""

import numpy as np
import pytest
from tests.prefixes import ALIKE, cached, report
from tests.toy import MODEL, PROMPT, Sees, run

from cmr import LayerCache, PluginError, Session, discovery, hookimpl
from cmr.testing import ToyModel


def test_every_miss_has_a_reason():
    session = Session.open(MODEL, ["prefix-cache:block=8"])
    assert cached(session)[1] == "0 of 52 reused: empty"
    assert cached(session)[1] == "51 of 52 reused"
    assert cached(session, "Zebra")[1] == "0 of 5 reused: first difference at token 0"
    assert cached(session, PROMPT[:10] + "Zebra")[1] == "10 of 15 reused: first difference at token 10"
    assert cached(session, PROMPT[:8] + "Zebra")[1] == "8 of 13 reused: first difference at token 8"
    assert cached(session, PROMPT + "Zebra")[1] == "52 of 57 reused: nothing stored further at token 52"
    assert cached(session, "Z")[1] == "0 of 1 reused: one token"
    figures = report(session)
    assert figures["missed"] == {"empty": 1, "first difference": 1, "one token": 1}
    assert figures["ended"] == {"first difference": 2, "nothing stored further": 1}
    assert (figures["requests"], figures["hits"]) == (7, 4) and figures["last"].startswith("0 of 1 ")


class Named:
    """The toy model with another template, or the like."""

    def __new__(cls, **facts):
        model = ToyModel()
        for name, value in facts.items():
            setattr(model, name, value)
        return model


class Halves:
    """A plugin that keeps K and V in other bits."""

    exact = False

    @hookimpl
    def kv_cache(self, model, layer):
        return LayerCache.factory(model, layer, dtype=np.float32)


@pytest.mark.parametrize(
    "model, plugins, limits, why",
    [
        (ToyModel(n_layers=2), [], {}, "other model"),
        (ToyModel(seed=1), [], {}, "other weights, options or version"),
        (ToyModel(window=9), [], {}, "other positions"),
        (MODEL, [], {"context": 500}, "other positions"),
        (Named(chat_template="x"), [], {}, "other template"),
        (MODEL, [Halves()], {}, "other plan"),
        (ToyModel(), [], {}, None),
        (MODEL, ["telemetry", Sees()], {}, None),
    ],
)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_what_belongs_to_another_key_is_not_used(model, plugins, limits, why, where, tmp_path):
    if where == "memory":
        first = again = discovery.find("prefix-cache")[0]()
    else:
        first = again = f"prefix-cache:dir={tmp_path}"
    cached(Session.open(MODEL, [first]))
    session = Session.open(model, [again, *plugins], **limits)
    tokens, said = cached(session)
    assert said == (f"0 of 52 reused: {why}" if why else "51 of 52 reused")
    assert tokens == cached(Session.open(model, plugins, **limits))[0]


def test_one_plugin_serves_two_sessions_of_different_models():
    shared = discovery.find("prefix-cache")[0](block=8)
    other = ToyModel(seed=1)
    sessions = [(model, Session.open(model, [shared])) for model in (MODEL, other)]
    for prompt in ALIKE:
        for model, session in sessions:
            assert cached(session, prompt)[0] == run(prompt=prompt, model=model, max_tokens=12)


# -- other caches --


def test_caches_that_decode_what_they_store_are_divided_all_the_same():
    class Bytes(LayerCache):
        """K and V as int8 with a scale."""

        def encode(self, x, keys):
            scale = np.abs(x).max(-1, keepdims=True) / 127 + 1e-9
            return np.round(x / scale).astype(np.int8), scale.astype(np.float16)

        def decode(self, packed, keys):
            return packed[0] * packed[1].astype(np.float32)

    class Packs:
        exact = False

        @hookimpl
        def kv_cache(self, model, layer):
            return Bytes.factory(model, layer) if layer else None

    session = Session.open(MODEL, ["prefix-cache:block=8", Packs()])
    for prompt in ALIKE:
        assert cached(session, prompt)[0] == run(Packs(), prompt=prompt, max_tokens=12)
    assert report(session)["hits"] == 7


def test_caches_that_cannot_be_divided_are_refused_by_name():
    class Whole(LayerCache):
        def snapshot(self):
            return {"all": super().snapshot()}

    class Wholes:
        exact = False

        @hookimpl
        def kv_cache(self, model, layer):
            return Whole.factory(model, layer) if layer == 2 else None

    with pytest.raises(PluginError, match=r"cannot divide what the cache of layer 2 \(wholes\) keeps"):
        Session.open(MODEL, ["prefix-cache", Wholes()])


def test_what_was_evicted_is_not_stored():
    class Evicts:
        exact = False

        def __init__(self, ragged):
            self.ragged = ragged

        @hookimpl
        def on_step(self, step):
            for part in step.parts:
                for held in part.seq.caches:
                    if len(held) > 20 and not held.ragged:
                        slots = [*range(4), *range(len(held) - 12, len(held))]
                        held.keep_heads([slots, slots[1:]]) if self.ragged else held.keep(slots)

    for ragged in (False, True):
        session = Session.open(MODEL, ["prefix-cache:block=8", Evicts(ragged)])
        for prompt in (PROMPT, PROMPT, "abc"):
            assert cached(session, prompt)[0] == run(Evicts(ragged), prompt=prompt, max_tokens=12)
        assert report(session)["unstored"] == {"positions are missing or stored otherwise": 2}


def test_a_plugin_that_follows_all_attention_is_refused():
    class Follows(Sees):
        evidence = ("cumulative-weights",)

    class Gives(LayerCache):
        evidence = ("cumulative-weights",)

    class Provides(Sees):
        @hookimpl
        def kv_cache(self, model, layer):
            return Gives.factory(model, layer)

    with pytest.raises(PluginError, match="prefix-cache cannot run beside follows"):
        Session.open(MODEL, ["prefix-cache", Follows(), Provides()])
