"""Perplexity and divergence of a text in chunks, saved baselines, and llama-perplexity's own figures."""

import math
import os
import struct
from contextlib import closing

import numpy as np
import pytest
from tests.cli_runs import bundled
from tests.tool_files import load_tool

import cmr
from cmr.bench.peer import LlamaWorker
from cmr.bench.quality import peer_logits
from cmr.eval import Divergence, compare
from cmr.eval.baseline import BaselineWriter, SavedBaseline
from cmr.eval.chunks import Chunks, predictions
from cmr.eval.perplexity import Live, Perplexity, compare_text, log_probs, perplexity
from cmr.eval.reader import Reader

tool = load_tool("random_model")

TEXT = "once upon a time there was a king who had a horse and a very small house by the sea " * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tool.random_model(tmp_path_factory.mktemp("eval") / "random.gguf", "small", "f32")
    model = cmr.open_model(path, device="portable", context=128)
    yield model
    model.close()


@pytest.fixture(scope="module")
def chunks(model):
    return Chunks.of(model, TEXT, 33, 3)


@cmr.plugin
class Biased:
    """Raise one logit."""

    exact = False
    shift: float = 2.0

    @cmr.hookimpl
    def on_logits(self, seq, draft, logits):
        logits[:, 300] += self.shift


@cmr.plugin
class Ends:
    """End every answer after a few tokens."""

    @cmr.hookimpl
    def on_token(self, seq, token):
        return "enough" if seq.n_new > 3 else None


def _log_softmax(rows):
    p = np.exp(rows.astype(np.longdouble))
    return np.log(p / p.sum(-1, keepdims=True)).astype(float)


# -- chunks --


def test_chunks_are_cut_from_the_tokens_and_begin_with_the_models_first(model, chunks):
    ids = model.tokenizer.encode(TEXT, bos=True)
    assert chunks.tokens.tolist() == [ids[33 * i : 33 * i + 33] for i in range(3)]
    assert chunks.fed(1) == [model.tokenizer.bos, *ids[34:66]]
    assert (chunks.first, chunks.scored) == (16, 16)
    assert chunks.following(2) == ids[66 + 17 : 99]
    even = Chunks.of(model, TEXT, 32)
    assert (even.first, even.scored, len(even)) == (16, 15, len(ids) // 32)


@pytest.mark.parametrize(
    "size, complaint", [(3, "at least 4"), (129, "do not fit a context of 128"), (120, "no chunk of 120")]
)
def test_chunks_that_cannot_be_cut_are_said(model, size, complaint):
    with pytest.raises(cmr.RequestError, match=complaint):
        Chunks.of(model, TEXT[:100], size)


def test_what_two_texts_share_is_read_once_and_changes_nothing(model):
    session = cmr.Session.open(model)
    ids = model.tokenizer.encode(TEXT, bos=True)[:40]
    other = [*ids[:30], *reversed(ids[5:15])]
    reader = Reader(session)
    for tokens, first in ((ids, 20), (other, 35), (other, 3), (ids[:10], 9), (ids, 0)):
        found = np.array(list(reader.rows(tokens, first)))
        alone = np.array(list(Reader(session).rows(tokens, first)))
        assert found.shape == (len(tokens) - first, model.n_vocab) and np.array_equal(found, alone)


# -- perplexity --


def test_perplexity_is_that_of_the_second_halves(model, chunks):
    logs = []
    for i in range(3):
        rows = _log_softmax(model.logits(chunks.fed(i), kv_dtype=np.float16))
        logs += [rows[at, chunks.tokens[i, at + 1]] for at in range(16, 32)]
    nll = -np.array(logs)
    value = math.exp(nll.mean())
    doubt = value * math.sqrt(((nll**2).mean() - nll.mean() ** 2) / (len(nll) - 1))
    said = []
    found = perplexity(cmr.Session.open(model), chunks, lambda done, total: said.append((done, total)))
    assert (found.tokens, said) == (48, [(0, 3), (1, 3), (2, 3)])
    assert (found.value, found.stderr) == pytest.approx((value, doubt), rel=1e-6)
    assert math.isnan(Perplexity.of([]).value)


def test_a_plugin_is_measured_in_the_whole_loop(model, chunks):
    plain, biased = (cmr.Session.open(model, plugins) for plugins in ([], [Biased()]))
    rows, others = (np.array(list(predictions(s, chunks, 1, decode=True))) for s in (plain, biased))
    expected = rows.copy()
    expected[:, 300] += 2
    np.testing.assert_array_equal(others, expected)
    prompts = np.array(list(predictions(plain, chunks, 1)))
    np.testing.assert_allclose(prompts, rows, atol=0.02)  # the roles round differently, no more


def test_a_plugin_that_ends_the_text_is_named_as_the_reason(model, chunks):
    with pytest.raises(cmr.RequestError, match="ended the text early, so it cannot be scored: enough"):
        perplexity(cmr.Session.open(model, [Ends()]), chunks)


# -- divergence from a baseline --


def test_sessions_on_one_model_are_compared_with_a_live_baseline(model, chunks):
    base, same, biased = (cmr.Session.open(model, p) for p in ([], [], [Biased()]))
    (alike,) = compare_text(Live(base, chunks), [same])
    assert len(alike) == 48 and Divergence.of(alike).mean == 0
    alike, other = compare_text(Live(base, chunks, decode=True), [same, biased], decode=True)
    assert Divergence.of(alike).mean == 0
    expected = []
    for i in range(3):
        for row, token in zip(predictions(same, chunks, i, decode=True), chunks.following(i)):
            shifted = row.copy()
            shifted[300] += 2
            expected.append(compare(row, shifted, token))
    assert Divergence.of(other) == Divergence.of(expected)


def _save(path, session, chunks):
    with BaselineWriter(path, chunks, session.model.n_vocab) as file:
        log_probs(session, chunks, keep=file.write)


def test_a_saved_baseline_has_the_layout_that_llama_perplexity_writes(model, chunks, tmp_path):
    session = cmr.Session.open(model)
    _save(tmp_path / "base", session, chunks)
    data = (tmp_path / "base").read_bytes()
    n_vocab = model.n_vocab
    assert data[:20] == b"_logits_" + struct.pack("<Iii", 33, n_vocab, 3)
    assert np.array_equal(np.frombuffer(data, "<i4", 99, 20).reshape(3, 33), chunks.tokens)
    assert len(data) == 20 + 4 * 99 + 48 * 2 * (2 * ((n_vocab + 1) // 2) + 4)
    scale, lowest = struct.unpack_from("<ff", data, 416)
    steps = np.frombuffer(data, "<u2", n_vocab, 424)
    logs = _log_softmax(next(predictions(session, chunks, 0)))
    assert steps.min() == 0 and steps.max() == 65535
    np.testing.assert_allclose(scale * steps + lowest, np.maximum(logs, logs.max() - 16), atol=scale)


def test_a_saved_baseline_says_what_a_live_one_does(model, chunks, tmp_path):
    base, biased = (cmr.Session.open(model, p) for p in ([], [Biased()]))
    _save(tmp_path / "base", base, chunks)
    saved = SavedBaseline(tmp_path / "base", model)
    (alike,), (other,) = (compare_text(saved, [s], decode=False) for s in (base, base))
    assert abs(Divergence.of(alike).mean) < 1e-5 and alike == other
    (far,) = compare_text(saved, [biased])
    (live,) = compare_text(Live(base, chunks, decode=True), [biased])
    assert Divergence.of(far).mean == pytest.approx(Divergence.of(live).mean, rel=0.02)


def test_a_row_without_any_spread_and_one_of_extremes_survive(model, tmp_path):
    chunks = Chunks(np.zeros((1, 5), np.int32), ())
    flat, far = np.zeros(model.n_vocab, np.float32), np.full(model.n_vocab, -np.inf, np.float32)
    far[7] = 3.0
    with BaselineWriter(tmp_path / "base", chunks, model.n_vocab) as file:
        file.write(flat), file.write(far)
    first, second = SavedBaseline(tmp_path / "base", model).log_probs(0)
    np.testing.assert_allclose(first, -math.log(model.n_vocab), rtol=1e-6)
    assert second.argmax() == 7 and second[7] == pytest.approx(0, abs=1e-4)
    assert second[8] == pytest.approx(-16, abs=1e-3)


def test_a_file_that_is_no_baseline_is_said(model, chunks, tmp_path):
    path = tmp_path / "base"
    _save(path, cmr.Session.open(model), chunks)
    data = path.read_bytes()
    cases = {
        b"GGUF" + data: (cmr.FileError, "is no file of log-probabilities: it begins with b'GGUF"),
        data[:12]: (cmr.FileError, "is no file of log-probabilities"),
        data[:-2]: (cmr.FileError, "ends early: 3 chunks take"),
        data[:12] + struct.pack("<i", 7) + data[16:]: (cmr.RequestError, "a vocabulary of 7, and this model"),
        data[:8] + struct.pack("<I", 999) + data[12:]: (cmr.RequestError, "chunks of 999 tokens"),
    }
    for content, (kind, complaint) in cases.items():
        path.write_bytes(content)
        with pytest.raises(kind, match=complaint):
            SavedBaseline(path, model)
    with pytest.raises(cmr.FileError, match="cannot be read"):
        SavedBaseline(tmp_path / "none", model)
    with pytest.raises(cmr.FileError, match="cannot be written"):
        BaselineWriter(tmp_path / "none" / "base", chunks, 9)


def test_a_baseline_that_breaks_off_leaves_no_file(chunks, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with BaselineWriter(tmp_path / "base", chunks, 9):
            raise KeyboardInterrupt
    assert not (tmp_path / "base").exists()


# -- llama-perplexity itself, of the sources in llama-cpp-python 0.3.36, on the same files --


@pytest.mark.parametrize(
    "text, n_ctx, value, stderr",
    [
        ("tinystories-val-0.8MB.txt", 256, 3.5796, 0.19869),
        ("tinystories-val-0.8MB.txt", 512, 3.5026, 0.13562),
        ("wiki.valid.raw", 256, 177.2270, 22.69139),
    ],
)
def test_perplexity_is_llama_perplexitys(shared, text, n_ctx, value, stderr):
    pytest.importorskip("numba")
    model = cmr.open_model(shared / "models" / "stories260K-f32.gguf", threads=1)
    words = (shared / "data" / "text" / text).read_text("utf-8")[:60000]
    found = perplexity(cmr.Session.open(model), Chunks.of(model, words, n_ctx, 8))
    assert found.value == pytest.approx(value, rel=5e-4)
    assert found.stderr == pytest.approx(stderr, rel=1e-3)
    model.close()


def test_perplexity_of_a_quantized_file_is_llama_cpps(shared):
    python = os.environ.get("CMR_PEER_PYTHON")
    if not python:
        pytest.skip("CMR_PEER_PYTHON names no interpreter with llama-cpp-python")
    model = cmr.open_model(bundled())
    text = (shared / "data" / "text" / "tinystories-val-0.8MB.txt").read_text("utf-8")
    chunks = Chunks.of(model, text, 512, 4)
    logs = []
    with closing(LlamaWorker(bundled(), python, 512)) as worker:
        for i in range(len(chunks)):
            rows = _log_softmax(peer_logits(worker, chunks.fed(i), model.n_vocab))[chunks.first : -1]
            logs += list(rows[range(chunks.scored), chunks.following(i)])
    found = perplexity(cmr.Session.open(model), chunks)
    assert found.value == pytest.approx(Perplexity.of(logs).value, rel=0.005)
    model.close()
