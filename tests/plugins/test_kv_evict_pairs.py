"""kv-evict beside plugins that stream, quantize and attend, what it costs the process, and the evidence it asks for."""

import tracemalloc

import pytest
from tests.models import Recipe, write_model
from tests.toy import Copies, Together, answer

from cmr import PluginError, Session, hookimpl, open_model
from cmr.testing import ToyModel

RECIPE = Recipe(layers=9, type="Q8_0", inner=256, dim=32, dim_v=32, context=1024)
PROMPT = [(7 * i * i + i) % 90 + 1 for i in range(300)]
SMALL = "budget=128,recent=16,every=8,window=12"
KINDS = ("policy=recent", "policy=h2o,heads", "policy=tova", "policy=snapkv", "policy=keydiff,heads")


@pytest.fixture(scope="module")
def model(tmp_path_factory, device):
    opened = open_model(write_model(tmp_path_factory.mktemp("evict") / "model.gguf", RECIPE), device=device)
    yield opened
    opened.close()


def evicting(model, kind, *others, **limits):
    session = Session.open(model, [f"kv-evict:{kind},{SMALL}", *others], **limits)
    tokens = answer(session, PROMPT, 24, ignore_eos=True)
    assert session.report()["kv-evict"]["evicted"] > 0
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_layers_give_the_same_tokens(model, kind, monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream.SAMPLE_SECONDS", 0.01)
    budget = f"layer-stream:budget={int(0.7 * model.file.nbytes)}"
    assert evicting(model, kind, budget, chunk=50) == evicting(model, kind)


@pytest.mark.parametrize("bits", ["kv-quant:bits=8", "kv-quant:bits=4"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_keys_are_cut_and_attended_to_alike_however_they_are_fed(model, kind, bits):
    alone = evicting(model, kind, bits)
    assert evicting(model, kind, bits, Copies(), Together(rows=11)) == alone
    assert evicting(model, kind, bits, chunk=37) == alone


def test_quantized_and_evicted_bytes_multiply(model):
    held = {}

    class Holds:
        exact = True

        @hookimpl
        def store_prefix(self, seq):
            held["bytes"] = sum(cache.nbytes for cache in seq.caches)

    sizes = []
    for plugins in ([], [f"kv-evict:{SMALL}"], ["kv-quant:bits=4"], [f"kv-evict:{SMALL}", "kv-quant:bits=4"]):
        answer(Session.open(model, [*plugins, Holds()]), PROMPT, 4, ignore_eos=True)
        sizes.append(held["bytes"])
    assert sizes[1] < 0.5 * sizes[0] and sizes[3] < 0.5 * sizes[2] < 0.25 * sizes[0]


@pytest.mark.parametrize("kind", ["policy=recent", "policy=h2o"])
def test_tiers_which_have_an_order_of_their_own_are_refused(model, kind):
    with pytest.raises(PluginError, match="kv-tiers"):
        Session.open(model, [f"kv-evict:{kind},{SMALL}", "kv-tiers"])


@pytest.mark.parametrize("kind", ["policy=keydiff", "policy=recent,heads"])
def test_the_process_gets_back_what_was_evicted(kind):
    model, seen = ToyModel(context=4096), []

    class Measures:
        exact = True

        @hookimpl
        def on_step(self, step):
            (part,) = step.parts
            seen.append((tracemalloc.get_traced_memory()[0], sum(cache.nbytes for cache in part.seq.caches)))

    session = Session.open(model, [f"kv-evict:{kind},{SMALL}", Measures()], chunk=2999)
    tracemalloc.start()
    try:
        answer(session, [i % 90 for i in range(3000)], 3, ignore_eos=True)
    finally:
        tracemalloc.stop()
    (before, held), (after, left) = seen[0], seen[1]
    assert left < 0.1 * held
    assert before - after > 0.9 * (held - left)


def test_attention_notes_only_what_is_asked_for(model):
    for kind, evidence in (("recent", ()), ("keydiff", ()), ("h2o", ("cumulative-weights",)),
                           ("tova", ("window-weights",)), ("snapkv", ("window-weights",))):  # fmt: skip
        plan = Session.open(model, [f"kv-evict:policy={kind},{SMALL}"]).plan
        assert plan.evidence == frozenset(evidence)
        assert (plan.caches[0]().noted is None) == (not evidence)


OTHERS = (
    *("attn-window:window=64", "attn-pages:size=16,top=4", "attn-block", "attn-extend:group=4,window=128"),
    "attn-pattern:kind=local,width=64",
)
OWN_CACHES = ("attn-pages", "attn-block", "attn-extend", "attn-pattern")  # or an attention of their own


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_variants_give_the_same_tokens_however_they_are_fed_or_are_refused(other, kind):
    name, model = other.partition(":")[0], ToyModel()
    if name in OWN_CACHES and kind != "policy=recent":
        with pytest.raises(PluginError, match=f"kv-evict .*{name}"):
            Session.open(model, [f"kv-evict:{kind},{SMALL}", other])
        return
    alone = evicting(model, kind, other)
    assert evicting(model, kind, other, Copies(), Together(rows=11)) == alone
