"""layer-stream: the plain tokens from weights that are mostly on the disk, in no more memory than allowed."""

import gc
import os
import threading
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
from tests.conftest import ROOT
from tests.models import Recipe, write_model
from tests.streaming import PROMPTS, answers, check_memory
from tests.toy import MODEL, Copies, Together

from cmr import PluginError, Session, hookimpl, open_model
from cmr.testing import check
from cmr_plugins.weight_budget import forget
from cmr_plugins.weight_reader import PAGE, Files, Memory, Ring, unit_of

LAYERS = 9
RECIPE = Recipe(layers=LAYERS, type="Q8_0", biases=("attn_q", "ffn_down", "output"), inner=256)
OTHERS = {
    "alone": [],
    "drafts": [Copies],
    "together": [lambda: Together(rows=6)],
    "batching": ["batching:width=2,tokens=9"],
    "watched": ["telemetry", "stop-loop:times=9"],
}


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream.SAMPLE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("stream") / "model.gguf", RECIPE)


@pytest.fixture(scope="module")
def model(path, device):
    opened = open_model(path, device=device)
    yield opened
    opened.close()


@pytest.fixture
def stream(model):
    """Open a session with the plugin, and others, at a budget: by default of all but three layers."""

    def opened(budget=None, *others, **limits):
        budget = budget or str(int(0.7 * model.file.nbytes))
        session = Session.open(model, [f"layer-stream:budget={budget}", *others], **limits)
        return session, session.plan.plugins["layer-stream"].source

    return opened


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("chunk", [512, 7])
def test_tokens_are_the_plain_runs(stream, model, others, chunk):
    for options in ({"temp": 0.0}, {"temp": 1.0, "seed": 5}):
        made = [other if isinstance(other, str) else other() for other in others]
        session, source = stream(None, *made, chunk=chunk)
        assert source.order and source.kept
        assert answers(session, **options) == answers(Session.open(model), **options)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_every_budget_gives_the_same_tokens(stream, model, share):
    least = stream(None)[1].resident_bytes - sum(u.size for u in stream(None)[1].kept)
    whole = stream(None)[1].fixed + sum(u.size for u in (*stream(None)[1].units, *stream(None)[1].pieces))
    session, source = stream(str(int(least + share * (whole - least))))
    assert source.resident_bytes <= least + share * (whole - least)
    assert answers(session) == answers(Session.open(model))


def test_the_output_matrix_is_streamed_in_pieces(stream, model, monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream.PIECE_ROWS", 32)
    monkeypatch.setattr("cmr_plugins.layer_stream.Source._largest", lambda source: 3000)
    session, source = stream(str(2 * max(unit.size for unit in stream()[1].units)))
    assert source.fixed == 0 and [unit.key for unit in source.pieces] == [
        ("output", start, start + 32) for start in (0, 32, 64)
    ]
    assert answers(session) == answers(Session.open(model))
    assert set(source.pieces) < set(source.order)


def test_a_head_in_between_reads_the_streamed_output_matrix(stream, model, monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream.PIECE_ROWS", 32)
    monkeypatch.setattr("cmr_plugins.layer_stream.Source._largest", lambda source: 3000)

    class Looks:
        exact = True

        @hookimpl
        def start_session(self, session):
            self.model, self.plan, self.seen = session.model, session.plan, []

        @hookimpl
        def on_layer(self, step, layer):
            if layer in (3, LAYERS - 1):
                self.seen.append(self.model.head(self.plan, step, slice(0, 1)).copy())

    plain, streamed = Looks(), Looks()
    answers(Session.open(model, [plain]))
    session, source = stream(str(2 * max(unit.size for unit in stream()[1].units)), streamed)
    monkeypatch.setattr(type(model.weights), "output_pieces", lambda weights: pytest.fail("not the source's"))
    answers(session)
    assert np.array_equal(plain.seen, streamed.seen)


def test_each_step_reads_what_is_not_kept_once(stream):
    session, source = stream()
    files, ring = source.files, source.ring
    list(session.generate(session.request([5, 6], max_tokens=4, temp=0.0)))
    quiet(ring)
    before, steps = files.nbytes, session.report()["steps"]
    list(session.generate(session.request([5, 6], max_tokens=8, temp=0.0)))
    quiet(ring)
    steps = session.report()["steps"] - steps
    each = sum(unit.size for unit in source.order)
    assert (steps - 1) * each <= files.nbytes - before <= (steps + 1) * each


def quiet(ring):
    """Wait until the buffers are full."""
    with ring.change:
        assert ring.change.wait_for(lambda: all(load.state == "ready" for load in ring.loads), timeout=10)


def test_what_is_foreseen_is_said_first_and_reported(stream, capsys):
    session, source = stream()
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("layer-stream: ") and "tok/s" in said.err
    answers(session)
    report = session.report()["layer-stream"]
    assert report["predicted_tps"] > 0 and report["read_rate"] > 0
    assert report["resident_bytes"] == source.resident_bytes


def test_of_experts_those_that_a_token_chooses_are_foreseen(tmp_path, device, monkeypatch):
    monkeypatch.setattr("cmr_plugins.layer_stream._compute_rate", lambda *_: 1e3)  # no disk is as slow
    path = write_model(tmp_path / "m.gguf", Recipe(layers=9, experts=(8, 2), type="Q8_0"))
    model = open_model(path, device=device)
    with Session.open(model, ["layer-stream:budget=70%"]) as session:
        read = {name: t for name, t in model.file.tensors.items() if len(t.shape) > 1 and "token" not in name}
        used = sum(t.nbytes / (4 if "_exps" in name else 1) for name, t in read.items())
        assert session.report()["layer-stream"]["predicted_tps"] == pytest.approx(1e3 / used)
    model.close()


def test_nothing_is_read_for_an_explanation(model):
    from cmr import discovery, plan
    from cmr.resolve import resolve

    resolved = resolve(discovery.load(["layer-stream:budget=70%"]), model)
    assert resolved.weights.ring is None and any("layer-stream" in line for line in plan.explain(resolved))
    assert resolved.memory.weights == resolved.weights.resident_bytes


def test_refusals_are_polite(stream):
    for budget, why in (
        ("10GB", "all .* of weights fit in the budget of"),
        ("1kB", "does not hold two layers"),
        ("plenty", "'plenty' is not a size"),
    ):
        with pytest.raises(PluginError, match=f"layer-stream: .*{why}"):
            stream(budget)
    with pytest.raises(PluginError, match="layer-stream reads weights from a GGUF file"):
        Session.open(MODEL, ["layer-stream"])


def test_a_file_that_was_read_whole_is_refused(path, device):
    model = open_model(path, device=device, mapped=False)
    with pytest.raises(PluginError, match="was read into memory whole"):
        Session.open(model, ["layer-stream"])
    model.close()


def test_a_step_that_ends_early_leaves_nothing_behind(stream, model):
    class Exit:
        @hookimpl
        def on_layer(self, layer):
            return layer == 4

    session, _ = stream(None, Exit())
    assert answers(session) == answers(Session.open(model, [Exit()]))


def test_layers_may_be_left_out_or_moved(stream, model):
    class Order:
        @hookimpl
        def layer_order(self):
            return [0, 3, 2, 5, 8, 7]

    session, _ = stream(None, Order())
    assert answers(session) == answers(Session.open(model, [Order()]))


def test_requests_by_turns_and_a_cancelled_one(stream, model):
    session, _ = stream()
    texts = [session.generate(session.request(p, max_tokens=9, temp=0.0)) for p in PROMPTS]
    next(texts[1])
    texts[1].close()
    got = list(zip(*zip_longest(texts[0], texts[2])))
    wanted = answers(Session.open(model), n=9)
    assert [list(tokens) for tokens in got] == [wanted[0], wanted[2]]


def test_a_file_that_cannot_be_read_ends_the_request_and_not_the_session(stream, model, monkeypatch):
    session, source = stream()
    read = Files.read

    def fails(self, unit, memory):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Files, "read", fails)
    quiet_reads = session.request([1, 2], max_tokens=6, temp=0.0)
    with pytest.raises(PluginError, match="layer-stream: weights cannot be read: Input/output error"):
        list(session.generate(quiet_reads))
    monkeypatch.setattr(Files, "read", read)
    assert answers(session) == answers(Session.open(model))


def test_the_thread_ends_with_the_session(stream):
    session, source = stream()
    thread = source.ring.thread
    assert thread.is_alive()
    del session, source
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_the_contracts_hold():
    bundled = open_model(ROOT / "models" / "tiny-q8_0.gguf")
    findings = check("layer-stream:budget=85%", bundled)
    assert [finding for finding in findings if not finding.holds] == []
    bundled.close()


def test_units_hold_their_bytes_wherever_they_lie(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 300_001, np.uint8)
    path = tmp_path / "bytes"
    data.tofile(path)
    ranges = [
        ("a", path, 10, 500),
        ("b", path, 200_000, 300_001),
        ("c", path, 600, 5000),
        ("d", path, 90_000, 90_001),
    ]
    unit = unit_of("u", ranges)
    files, memory = Files([path]), Memory(unit.size)
    files.read(unit, memory)
    for name, _, start, stop in ranges:
        place = unit.places[name]
        assert bytes(memory.view[place : place + stop - start]) == data[start:stop].tobytes()
        assert (place - start) % PAGE == 0
    assert unit.nbytes == sum(stop - start for *_, start, stop in ranges)
    path.write_bytes(b"short")
    with pytest.raises(OSError, match="ended at byte"):
        files.read(unit, memory)
    files.close()


def test_of_a_tensor_whole_pages_are_forgotten():
    calls = []
    source = SimpleNamespace(advise=lambda *call: calls.append(call))
    forget(SimpleNamespace(offset=10, nbytes=100, source=source))
    assert calls == []
    forget(SimpleNamespace(offset=10, nbytes=3 * PAGE, source=source))
    assert {call[1:] for call in calls} == {(PAGE, 2 * PAGE + 10)}


def test_the_ring_serves_any_order(tmp_path):
    path = tmp_path / "bytes"
    data = np.repeat(np.arange(7, dtype=np.uint8), PAGE)
    data.tofile(path)
    units = [unit_of(i, [("x", path, i * PAGE, (i + 1) * PAGE)]) for i in range(7)]
    ring = Ring(Files([path]), units, [Memory(PAGE) for _ in range(2)])
    for i in [*range(7), 0, 1, 5, 6, 3, *np.random.default_rng(1).integers(0, 7, 200).tolist()]:
        slot = ring.acquire(units[i])
        assert set(ring.slots[slot].view[:PAGE]) == {i}
        ring.release(units[i])
    ring.stop()
    ring.thread.join(10)
    assert not ring.thread.is_alive() and threading.active_count() >= 1


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_stays_within_the_budget(path, tmp_path):
    pytest.importorskip("numba")
    large = write_model(
        tmp_path / "large.gguf", Recipe(layers=14, width=512, inner=1536, heads=8, dim=64, dim_v=64)
    )
    budget = os.path.getsize(large) // 4
    check_memory(path, large, "layer-stream", budget)
