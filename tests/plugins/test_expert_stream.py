"""expert-stream: the plain tokens from experts that are mostly on the disk, in no more memory than allowed."""

import gc
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
from tests.models import RECIPES, Recipe, write_model
from tests.streaming import answers, check_memory
from tests.toy import MODEL, Copies, Together
from tests.vocabularies import sentence_pieces

from cmr import PluginError, Session, discovery, hookimpl, open_model
from cmr.testing import check
from cmr_plugins.expert_memory import ExpertMemory
from cmr_plugins.expert_stream import Source
from cmr_plugins.weight_reader import PAGE, Files

MODELS = {
    name: replace(
        RECIPES[name], type="Q8_0", layers=4, width=128, expert_inner=inner, vocabulary=sentence_pieces()
    )
    for name, inner in (("qwen3moe", 96), ("qwen2moe", 32), ("deepseek", 32), ("gpt-oss", 64))
}
# Exact plugins by name, with options under which they have something to do; those that make no sense here are left out.
OPTIONS = {
    "prefix-cache": "answers=false",
    "budget": "answer=9",
    "stop-loop": "times=2,span=8,least=6",
    "spec-lookup": "gain=0",
    "batching": "tokens=9",
}
NOT_HERE = ("spec-draft", "spec-exit", "layer-stream", "expert-stream")
EXACT = [name for name in discovery.BUILTIN if name in OPTIONS or discovery.describe(name).exact is True]
OTHERS = [
    *(f"{name}:{OPTIONS[name]}" if name in OPTIONS else name for name in EXACT if name not in NOT_HERE),
    Copies,
    Together,
]


def label(kind):
    return kind.partition(":")[0] if isinstance(kind, str) else kind.__name__.lower()


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr("cmr_plugins.expert_stream.SAMPLE_SECONDS", 0.01)


@pytest.fixture(scope="module", params=MODELS)
def model(tmp_path_factory, device, request):
    path = tmp_path_factory.mktemp("experts") / "model.gguf"
    opened = open_model(write_model(path, MODELS[request.param]), device=device)
    yield opened
    opened.close()


def least(model):
    """The smallest budget, and the smallest in which everything fits."""
    source = Source(model, model.file.nbytes)  # with its pages that several share it takes more
    return source.fixed + source.experts * max(source.sizes.values()), source.fixed + source.total


def streamed(model, *others, share=0.2, **limits):
    low, high = least(model)
    session = Session.open(
        model, [f"expert-stream:budget={int(low + share * (high - low))}", *others], **limits
    )
    return session, session.plan.plugins["expert-stream"].source


@pytest.mark.parametrize("share", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("chunk", [512, 7])
def test_tokens_are_the_plain_runs(model, share, chunk):
    for options in ({"temp": 0.0}, {"temp": 1.0, "seed": 5}):
        session, source = streamed(model, share=share, chunk=chunk)
        assert answers(session, **options) == answers(Session.open(model), **options)
        assert source.asked and 0 < source.taken <= source.room
        assert share or source.missed


@pytest.mark.parametrize("other", OTHERS, ids=label)
def test_tokens_are_the_plain_runs_beside_every_exact_plugin(model, other):
    for options in ({"temp": 0.0}, {"temp": 1.0, "seed": 5}):
        alone, beside = (other if isinstance(other, str) else other() for _ in range(2))
        try:
            wanted = answers(Session.open(model, [alone]), **options)
        except PluginError as error:
            assert other == "kv-window" and "no layer of this model has a window" in str(error)
            return
        session, source = streamed(model, beside)
        assert session.plan.exact and answers(session, **options) == wanted
        assert source.asked


def test_what_is_chosen_is_there_and_what_is_not_held_is_gone(model):
    """After every choice, held experts have the file's bytes, and the memory of the others has been given back."""
    session, source = streamed(model, share=0.1)
    choose, memory = source.choose, source.memory

    def looks(layer, experts):
        choose(layer, experts)
        assert source.held[layer, experts].all()
        assert (
            source.taken
            == sum(source.sizes[at] * source.held[at].sum() for at in source.tensors)
            <= source.room
        )

    source.choose = looks
    answers(session)
    for layer, tensors in source.tensors.items():
        for tensor in tensors:
            base, each = memory.places[tensor.name], tensor.nbytes // source.experts
            found = np.frombuffer(memory.view[base : base + tensor.nbytes], np.uint8).reshape(-1, each)
            rows = tensor.data.reshape(-1, each)
            assert all(np.array_equal(found[e], rows[e]) for e in np.flatnonzero(source.held[layer]))
            # A page whose experts are all gone reads as zeros.
            pages = np.frombuffer(memory.view, np.uint8)[base // PAGE * PAGE :][
                : -(-tensor.nbytes // PAGE) * PAGE
            ]
            for at, page in enumerate(pages.reshape(-1, PAGE)):
                start = at * PAGE - base % PAGE
                inside = range(max(0, start // each), min(source.experts, -(-(start + PAGE) // each)))
                assert source.held[layer, [*inside]].any() or not page.any()


def test_what_is_held_is_not_read_again(model):
    session, source = streamed(model, share=0.9)
    answers(session, [[3, 4]], n=3)
    read, missed = source.read_bytes, source.missed
    answers(session, [[3, 4]], n=3)
    room = source.room - source.taken
    assert (source.read_bytes, source.missed) == (read, missed) or room < max(source.sizes.values())
    report = session.report()["expert-stream"]
    assert report["held_bytes"] == source.taken <= report["resident_bytes"] - source.fixed
    assert report["hit_rate"] == 1 - source.missed / source.asked > 0.3
    assert report["read_bytes"] == source.read_bytes


def test_what_is_foreseen_is_said_first(model, capsys):
    session, source = streamed(model)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("expert-stream: ") and "tok/s" in said.err
    assert session.report()["expert-stream"]["predicted_tps"] > 0
    assert session.plan.memory.weights == source.resident_bytes


def test_nothing_is_read_for_an_explanation(model):
    from cmr import plan
    from cmr.resolve import resolve

    resolved = resolve(discovery.load([f"expert-stream:budget={least(model)[0]}"]), model)
    assert resolved.weights.memory is None and any("expert-stream" in line for line in plan.explain(resolved))


def test_refusals_are_polite(model, tmp_path, device):
    low, high = least(model)
    for budget, why in (
        (high, "all .* of weights fit in the budget of"),
        (low - 1, "does not hold the experts of a layer"),
        ("plenty", "'plenty' is not a size"),
    ):
        with pytest.raises(PluginError, match=f"expert-stream: .*{why}"):
            Session.open(model, [f"expert-stream:budget={budget}"])
    with pytest.raises(PluginError, match="expert-stream reads weights from a GGUF file"):
        Session.open(MODEL, ["expert-stream"])
    dense = open_model(write_model(tmp_path / "dense.gguf", Recipe()), device=device)
    with pytest.raises(PluginError, match="this model has no experts; layer-stream reads whole layers"):
        Session.open(dense, ["expert-stream"])
    with pytest.raises(PluginError, match="expert-stream.*layer-stream|layer-stream.*expert-stream"):
        Session.open(model, ["expert-stream", "layer-stream"])
    dense.close()


def test_a_file_that_cannot_be_read_ends_the_request_and_not_the_session(model, monkeypatch):
    session, source = streamed(model)
    read = Files.read

    def fails(self, unit, memory):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Files, "read", fails)
    with pytest.raises(PluginError, match="expert-stream: weights cannot be read: Input/output error"):
        list(session.generate(session.request([*range(30)], max_tokens=6, temp=0.0)))
    assert source.taken == sum(source.sizes[layer] * source.held[layer].sum() for layer in source.tensors)
    monkeypatch.setattr(Files, "read", read)
    assert answers(session) == answers(Session.open(model))


def test_layers_may_be_left_out_or_moved(model):
    class Order:
        @hookimpl
        def layer_order(self):
            return [3, 1, 2]

    session, _ = streamed(model, Order())
    assert answers(session) == answers(Session.open(model, [Order()]))


def test_a_step_that_ends_early_leaves_nothing_behind(model):
    class Exit:
        @hookimpl
        def on_layer(self, layer):
            return layer == 2

    session, _ = streamed(model, Exit())
    assert answers(session) == answers(Session.open(model, [Exit()]))


def test_threads_end_with_the_session(model):
    session, source = streamed(model)
    answers(session, [[1]], n=2)
    threads, busy = list(source.readers._threads), threading.Event()
    source.readers.submit(busy.wait)
    # Whoever collects it, a thread that is just starting perhaps, must not wait for others.
    cycle = [session, source]
    cycle.append(cycle)
    del session, source, cycle
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join(20)
    waits = collector.is_alive()
    busy.set()
    assert not waits
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_the_contracts_hold(model):
    low, high = least(model)
    findings = check(f"expert-stream:budget={(low + high) // 2}", model)
    assert [finding for finding in findings if not finding.holds] == []


# -- what is kept --


class Shelf:
    """A Source without a file: what it would read is counted."""

    def __init__(self, layers, experts, room):
        self.source = source = Source.__new__(Source)
        source.experts, source.room = experts, room
        source.tensors = source.sizes = dict.fromkeys(range(layers), 1)
        source.memory = self
        source.use = np.full((layers, experts), 0.1)
        source.held = np.zeros((layers, experts), bool)
        source.taken = source.asked = source.missed = 0
        source.waited = 0.0
        source._read = self._read

    def drop(self, tensors, expert, held):
        assert not held[expert]

    def _read(self, layer, missing):
        self.source.held[layer, missing] = True
        self.source.taken += len(missing)

    def run(self, choices):
        """The share of choices that were held, over steps of (layer, experts)."""
        for layer, experts in choices:
            self.source.choose(layer, experts)
            assert self.source.taken == self.source.held.sum() <= self.source.room
        return 1 - self.source.missed / self.source.asked


def least_recently_used(choices, room):
    """The share of choices that a cache finds which drops what was used the longest time ago."""
    held, found, asked = {}, 0, 0
    for layer, experts in choices:
        for expert in experts.tolist():
            asked += 1
            found += held.pop((layer, expert), None) is not None
            held[layer, expert] = True
            if len(held) > room:
                del held[next(iter(held))]
    return found / asked


def zipf(layers, experts, chosen, steps, power, seed=0):
    """Steps of a token each, whose experts are chosen as often as their rank to a power says, in each layer its own."""
    rng = np.random.default_rng(seed)
    ranks = np.argsort(rng.random((layers, experts)), axis=1)
    odds = np.log(1.0 / (1 + ranks) ** power)
    for _ in range(steps):
        drawn = np.argsort(-(odds + rng.gumbel(size=odds.shape)), axis=1)[:, :chosen]
        for layer in range(layers):
            yield layer, np.sort(drawn[layer])


@pytest.mark.parametrize("power", [0.0, 0.7, 1.2])
def test_more_is_found_than_by_dropping_the_least_recently_used(power):
    layers, experts, chosen, room = 6, 32, 4, 64
    choices = list(zipf(layers, experts, chosen, 400, power))
    found = Shelf(layers, experts, room).run(choices)
    assert found > least_recently_used(choices, room) + 0.01
    # What could be found by whoever knows the odds and keeps the likeliest all the time.
    assert power or found == pytest.approx(room / (layers * experts), abs=0.05)


def test_prompts_that_choose_everything_keep_what_comes_first_again():
    """A pass over all experts of all layers finds nothing by recency, and here most of what there is room for."""
    layers, experts = 8, 16
    every = [(layer, np.arange(experts)) for _ in range(20) for layer in range(layers)]
    room = 5 * experts
    assert least_recently_used(every, room) == 0
    assert Shelf(layers, experts, room).run(every) > 0.8 * (room - experts) / (layers * experts)


def test_a_change_of_habits_is_noticed():
    layers, experts, room = 4, 32, 40
    first = list(zipf(layers, experts, 4, 300, 1.5, seed=1))
    second = list(zipf(layers, experts, 4, 300, 1.5, seed=2))
    shelf = Shelf(layers, experts, room)
    shelf.run(first)
    shelf.source.asked = shelf.source.missed = 0
    changed = shelf.run(second)
    assert changed > Shelf(layers, experts, room).run(second) - 0.08


# -- memory --


def test_addresses_take_no_memory_until_they_are_read(tmp_path):
    class Part:
        def __init__(self, name, offset, nbytes):
            self.name, self.offset, self.nbytes = name, offset, nbytes
            self.source = type("Where", (), {"path": tmp_path / "bytes"})

    data = np.random.default_rng(0).integers(1, 256, 400_000, np.uint8)
    data.tofile(tmp_path / "bytes")
    tensors = [Part("a", 96, 30 * 9001), Part("b", 96 + 30 * 9001, 30 * 700)]
    memory, files = ExpertMemory(tensors, 30), Files([tmp_path / "bytes"])
    held = np.zeros(30, bool)
    rng = np.random.default_rng(1)
    for _ in range(200):
        expert = int(rng.integers(30))
        held[expert] = not held[expert]
        if held[expert]:
            files.read(memory.unit(tensors, expert), memory)
        else:
            memory.drop(tensors, expert, held)
        for tensor in tensors:
            each = tensor.nbytes // 30
            for at in np.flatnonzero(held):
                start = memory.places[tensor.name] + at * each
                begin = tensor.offset + at * each
                assert bytes(memory.view[start : start + each]) == data[begin : begin + each].tobytes()
    for expert in np.flatnonzero(held).tolist():
        held[expert] = False
        memory.drop(tensors, expert, held)
    assert not np.frombuffer(memory.view, np.uint8).any()
    files.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_stays_within_the_budget(tmp_path):
    pytest.importorskip("numba")
    recipe = replace(RECIPES["qwen3moe"], type="Q8_0", dense=(), experts=(32, 4))
    small = write_model(tmp_path / "small.gguf", recipe)
    large = write_model(tmp_path / "large.gguf", replace(recipe, width=1024, expert_inner=512))
    budget = os.path.getsize(large) * 2 // 5
    check_memory(small, large, "expert-stream", budget)
