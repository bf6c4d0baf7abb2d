"""Plugins on a model most of whose layers are recurrent: they serve the others and leave these alone, or refuse."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tests.models import RECIPES, write_model
from tests.toy import Copies, Preempts, Sees, Together

import cmr
from cmr import PluginError, Session, discovery
from cmr.cli.warmup import warm_model
from cmr.forecast import foretell
from cmr.gguf_file import open_gguf
from cmr.state import DeltaState
from cmr.testing import check

NANO = Path(__file__).parents[2] / "models" / "nano-q8_0.gguf"
EXITS = "cmr.early_exit_layers"
RECURRENT = (0, 2, 3, 4, 6, 7)
EXACT = {
    "answer-cache": "answer-cache",
    "batching": "batching:width=3,tokens=24",
    "budget": "budget:answer=9",
    "expert-stream": "expert-stream:budget=70%",
    "grammar": "grammar",
    "layer-stream": "layer-stream:budget=65%",
    "stop-loop": "stop-loop:times=2,span=8,least=6",
    "telemetry": "telemetry",
    "tuner": "tuner",
}
INEXACT = {
    "answer-similar": "answer-similar",
    "attn-block": "attn-block",
    "attn-extend": "attn-extend:group=4,window=64",
    "attn-pages": "attn-pages:first=0,top=1,size=16,recent=1",
    "attn-pattern": "attn-pattern:width=8,step=4",
    "attn-window": "attn-window:window=16,sinks=2",
    "context": "context:policy=truncate",
    "early-exit": "early-exit:sure=0.02",
    "kv-evict": "kv-evict:budget=48,every=8",
    "kv-quant": "kv-quant:bits=4",
    "kv-tiers": "kv-tiers:f16=64,q8=128",
}
REFUSED = {
    "kv-window": "kv-window: no layer of this model has a window",
    "prefix-cache": "prefix-cache keeps blocks of tokens, and layer 0 is recurrent",
    "spec-draft": "spec-draft: .* has recurrent layers, whose states cannot take a wrong guess back",
    "spec-exit": "spec-exit needs to roll caches back, and the state of layer 0, which is recurrent, cannot",
    "spec-lookup": "spec-lookup needs to roll caches back, and the state of layer 0, which is recurrent, cannot",
}
ELSEWHERE = ("attn-plan", "kv-auto")  # which choose among these by measuring
PROMPTS = ([5, 9, 300, 7, 7, 5, 9, 300], list(range(20, 110)), [5, 9, 300, 7, 7, 5, 9, 300, 7, 8])
SAMPLERS = ({"temp": 0.0}, {"temp": 1.0, "seed": 3})
LENGTH = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("numba")
    with open_gguf(NANO) as file:
        more = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    more[EXITS] = np.array([1, 2], np.int32)
    kinds = {"attention.recurrent_layers": tuple(layer in RECURRENT for layer in range(8))}
    recipe = replace(RECIPES["qwen3next"], dim=32, dim_v=32, layers=8, recurrent=RECURRENT, vocabulary=more)
    recipe = replace(recipe, meta=kinds | {"rope.dimension_count": 8}, context=512)
    path = write_model(tmp_path_factory.mktemp("recurrent") / "m.gguf", recipe)
    opened = cmr.open_model(path, threads=2)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream.SAMPLE_SECONDS", 0.01)


def answers(session, sampler):
    """Run all prompts together; (tokens, reason) of each."""
    seqs = [session.add(session.request(p, max_tokens=LENGTH, ignore_eos=True, **sampler)) for p in PROMPTS]
    while session.step():
        pass
    assert [seq.error for seq in seqs] == [None] * len(seqs)
    return [(seq.new, seq.stop) for seq in seqs]


@pytest.fixture(scope="module")
def plain(model):
    """The plain tokens by sampler, for each prompt."""
    return [answers(Session.open(model), sampler) for sampler in SAMPLERS]


def test_every_plugin_is_tried_here():
    tried = {*EXACT, *INEXACT, *REFUSED, *ELSEWHERE}
    assert tried == set(discovery.BUILTIN)


KINDS = [*EXACT.values(), Together, Preempts, Sees]
SEAMS = {
    "scheduler": (Together, Preempts, EXACT["batching"]),
    "weight_source": (EXACT["expert-stream"], EXACT["layer-stream"]),
}  # of which a session has one owner


def label(kind):
    return kind.partition(":")[0] if isinstance(kind, str) else kind.__name__.lower()


@pytest.mark.parametrize(
    "kinds",
    [*((kind,) for kind in KINDS), *combinations(KINDS, 2)],
    ids=lambda kinds: "+".join(map(label, kinds)),
)
def test_exact_plugins_and_pairs_of_them_give_the_plain_tokens(model, plain, kinds):
    for seam, owners in SEAMS.items():
        if sum(kind in owners for kind in kinds) > 1:
            with pytest.raises(PluginError, match=f"both provide {seam}"):
                Session.open(model, [kind if isinstance(kind, str) else kind() for kind in kinds])
            return
    for chunk in (512, 7):
        session = Session.open(
            model, [kind if isinstance(kind, str) else kind() for kind in kinds], chunk=chunk
        )
        for sampler, wanted in zip(SAMPLERS, plain):
            for (found, stop), (whole, _) in zip(answers(session, sampler), wanted):
                assert found == (whole[: len(found)] if stop in ("loop", "budget") else whole)


@pytest.mark.parametrize("kind", [*EXACT.values(), *INEXACT.values()], ids=label)
def test_plugins_keep_their_contracts(model, kind):
    found = [
        finding for finding in check(kind, model) if finding.contract != "keeps cache laws"
    ]  # no matter here
    wrong = [finding for finding in found if not finding.holds]
    assert not wrong, wrong


@pytest.mark.parametrize("kind", INEXACT.values(), ids=label)
def test_what_serves_keys_and_values_leaves_states_alone(model, kind):
    plan = Session.open(model, [kind]).plan
    assert plan.kv_layers == (1, 5)
    for layer in RECURRENT:
        assert plan.owners["kv_cache"][layer] == plan.owners["attention"][layer] == "built in"
        assert isinstance(plan.caches[layer](), DeltaState)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(model, name):
    options = {"spec-draft": f":model={model.path}"}
    with pytest.raises(PluginError, match=REFUSED[name]):
        Session.open(model, [name + options.get(name, "")])


def test_a_drafter_of_anybodys_is_refused(model):
    with pytest.raises(PluginError, match="copies needs to roll caches back, and the state of layer 0"):
        Session.open(model, [Copies()])


@pytest.mark.parametrize("policy", ["shift", "page"])
def test_an_answer_goes_on_behind_the_context(model, policy):
    with Session.open(model, [f"context:policy={policy},keep=4,top=1,size=16"], context=96) as session:
        found = list(session.generate(session.request(PROMPTS[0], max_tokens=150, temp=0.0, ignore_eos=True)))
    # What the file's own context allows shows that the states went on: the first tokens are the same.
    assert len(found) >= 96 - len(PROMPTS[0])


def test_a_conversation_keeps_its_states(model, monkeypatch):
    session = Session.open(model)
    first = session.text(PROMPTS[1], max_tokens=8, temp=0.0, ignore_eos=True)
    for _ in first:
        pass
    prompt = [*first.seq.tokens, 40, 41, 42]
    fed = session.report()["prompt_tokens"]
    second = session.text(prompt, max_tokens=8, temp=0.0, ignore_eos=True, after=first.seq)
    for _ in second:
        pass
    assert session.report()["prompt_tokens"] - fed == len(prompt) - (len(PROMPTS[1]) + 7)
    # What does not go on from the end is fed anew.
    fed = session.report()["prompt_tokens"]
    third = session.text(prompt[:-6], max_tokens=8, temp=0.0, ignore_eos=True, after=second.seq)
    for _ in third:
        pass
    assert session.report()["prompt_tokens"] - fed == len(prompt) - 6
    fresh = Session.open(model).text(prompt[:-6], max_tokens=8, temp=0.0, ignore_eos=True)
    for _ in fresh:
        pass
    assert third.seq.new == fresh.seq.new


@pytest.mark.parametrize("layer", [0, 2])
def test_an_interrupted_step_leaves_no_row_in_a_state_twice(model, layer, monkeypatch):
    """Ctrl-C between two layers: those before it have taken the token in, the others have not."""

    class Interrupts:
        armed = False

        @cmr.hookimpl
        def on_layer(self, step, layer, hidden):
            if self.armed and layer == stop:
                self.armed = False
                raise KeyboardInterrupt

    stop, plugin = layer, Interrupts()
    session = Session.open(model, [plugin])
    wanted = list(
        Session.open(model).generate(session.request(PROMPTS[1], max_tokens=20, temp=0.0, ignore_eos=True))
    )
    seq = session.add(session.request(PROMPTS[1], max_tokens=20, temp=0.0, ignore_eos=True))
    for _ in range(6):
        session.step()
    plugin.armed = True
    with pytest.raises(KeyboardInterrupt):
        session.step()
    while session.step():
        pass
    assert seq.new == wanted


def test_layer_stream_streams_here(model):
    source = Session.open(model, [EXACT["layer-stream"]]).plan.weights
    assert source.order and source.kept


def test_a_setting_is_chosen_for_keys_and_values_alone(model, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran away " * 40)
    options = f"text={tmp_path}/text.txt,dir={tmp_path},kl=100,tokens=129,settings=kv-quant:bits=8"
    plan = Session.open(model, [f"kv-auto:{options}"]).plan
    owners = plan.owners["kv_cache"]
    assert {owners[layer] for layer in plan.kv_layers} == {"kv-auto"}
    assert {owners[layer] for layer in RECURRENT} == {"built in"}


def test_a_plan_of_attention_leaves_states_alone(model, tmp_path):
    choices, layers = ["full", "16+2"], model.n_layers
    found = {"model": model.config.name, "layers": layers, "width": model.config.n_embd, "lengths": [0]}
    found |= {"choices": choices, "kl": [[[0.0] * layers, [0.001] * layers]], "slots": [[64.0, 18.0]]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    with Session.open(model, [f"attn-plan:file={path},kl=1"]) as session:
        owners = session.plan.owners["attention"]
        assert [owner for owner in owners if owner == "attn-plan"] == ["attn-plan"] * 2
        ruled = answers(session, SAMPLERS[0])
    with Session.open(model, ["attn-window:window=16,sinks=2"]) as session:
        assert answers(session, SAMPLERS[0]) == ruled


def test_a_warm_model_lacks_nothing(model):
    """A batch stands for drafts, which recurrent layers cannot take back."""
    warm_model(model)
    before = set(model.ops._addresses)
    answers(Session.open(model, [EXACT["batching"]]), SAMPLERS[0])
    assert set(model.ops._addresses) == before


def test_speed_is_foretold(model):
    with Session.open(model) as session:
        speed = foretell(session, 100, temp=0.0)
    assert speed.depth == 100 and speed.kv_bytes == 100 * session.plan.memory.kv_token
    assert min(speed.token, speed.deep, speed.prompt) > 0


def test_memory_is_foretold(model):
    session = Session.open(model)
    seq = session.add(session.request(PROMPTS[1], max_tokens=1, temp=0.0))
    while session.step():
        pass
    states = [seq.caches[layer] for layer in RECURRENT]
    assert session.plan.memory.state == sum(state.nbytes for state in states)
    assert session.plan.memory.state == sum(
        array.nbytes for state in states for array in state.snapshot().values()
    )
    assert session.plan.memory.kv_token == 2 * session.plan.caches[1]().token_bytes
