"""Every exact plugin, alone and beside layer-stream, gives the plain tokens on the bundled model, compiled."""

from pathlib import Path

import pytest
from tests.toy import Copies, Sees, Together

import cmr
from cmr import PluginError, Session, discovery

TINY = Path(__file__).parents[2] / "models" / "tiny-q8_0.gguf"
OPTIONS = {
    "prefix-cache": "answers=false",
    "budget": "answer=9",
    "stop-loop": "times=2,span=8,least=6",
    "spec-draft": f"model={TINY},gain=0,depth=3,threads=1",
    "spec-lookup": "gain=0,ngram=2",
}
STREAM = "layer-stream:budget=60%"
EXACT = [name for name in discovery.BUILTIN if name in OPTIONS or discovery.describe(name).exact is True]
# The first is beside each other one here, the others have a test file each.
ELSEWHERE = ("layer-stream", "kv-window", "expert-stream")
OTHERS = [
    *(f"{name}:{OPTIONS[name]}" if name in OPTIONS else name for name in EXACT if name not in ELSEWHERE),
    Copies,
    Together,
    Sees,
]
PROMPTS = ([5, 9, 300, 7, 7, 5, 9, 300], list(range(20, 60)), [5, 9, 300, 7, 7, 5, 9, 300])
SAMPLERS = ({"temp": 0.0}, {"temp": 1.0, "seed": 3})
LENGTH = 16


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("numba")
    opened = cmr.open_model(TINY, threads=2)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def plain(model):
    """The plain tokens by sampler, for each prompt."""
    return [answers(Session.open(model), sampler) for sampler in SAMPLERS]


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream.SAMPLE_SECONDS", 0.01)


def answers(session, sampler):
    """Run all prompts together; (tokens, reason) of each."""
    texts = [session.add(session.request(p, max_tokens=LENGTH, ignore_eos=True, **sampler)) for p in PROMPTS]
    while session.step():
        pass
    assert [text.error for text in texts] == [None] * len(texts)
    return [(text.new, text.stop) for text in texts]


def label(kind):
    return kind.partition(":")[0] if isinstance(kind, str) else kind.__name__.lower()


@pytest.mark.parametrize("beside", [(), (STREAM,)], ids=["alone", "layer-stream"])
@pytest.mark.parametrize("kind", OTHERS, ids=label)
def test_tokens_are_the_plain_runs(model, plain, kind, beside):
    for chunk in (512, 7):
        kinds = [*beside, kind if isinstance(kind, str) else kind()]
        try:
            session = Session.open(model, kinds, chunk=chunk)
        except PluginError as error:
            assert label(kind) == "spec-exit" and "spec-exit" in str(error), error
            return
        assert session.plan.exact
        for sampler, wanted in zip(SAMPLERS, plain):
            for (found, stop), (whole, _) in zip(answers(session, sampler), wanted):
                assert found == (whole[: len(found)] if stop in ("loop", "budget", "answered") else whole)


def test_layer_stream_streams_here(model):
    source = Session.open(model, [STREAM]).plan.weights
    assert source.order and source.kept
