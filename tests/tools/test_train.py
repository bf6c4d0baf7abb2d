"""The recipe that trains the bundled models: a few steps, export and read back, exact resumption."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is only needed to train the bundled models")
pytest.importorskip("sentencepiece", reason="sentencepiece is only needed to train the bundled models")
gguf = pytest.importorskip("gguf", reason="gguf is only needed to train the bundled models")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.train import tasks  # noqa: E402
from tools.train.corpus import read_sources  # noqa: E402
from tools.train.export import interleave, read_gguf, separate, write_gguf  # noqa: E402
from tools.train.model import SHAPES, Llama, attend  # noqa: E402
from tools.train.rows import Rows  # noqa: E402
from tools.train.train import Plan, Run, train  # noqa: E402
from tools.train.truecase import Truecaser  # noqa: E402
from tools.train.vocabulary import Vocabulary, train_vocabulary  # noqa: E402

STORY = "Once upon a time, Tom had a red ball. {} liked it. They ran and played all day.\n\nThe end."


@pytest.fixture(scope="module")
def texts():
    names = [a + b for a in ("Li", "Ma", "To", "Be", "Ru") for b in ("na", "mo", "ty", "ri", "lle", "bu")]
    return [STORY.format(name) * 3 for name in names]


@pytest.fixture(scope="module")
def vocabulary(texts):
    words = " ".join(tasks.WORDS + tasks.NAMES)
    return Vocabulary(train_vocabulary([*texts, words], SHAPES["test"].vocab))


def start(folder, vocabulary, texts, **plan):
    sources = {"stories": [np.array(vocabulary.encode(t), np.uint16) for t in texts]}
    plan = Plan(**{"steps": 6, "decay": 2, "warmup": 2, "batch": 128, "save_every": 3} | plan)
    return Run(folder, SHAPES["test"], plan, Rows(vocabulary, sources, seed=1))


def test_loss_falls(tmp_path, vocabulary, texts):
    run = start(tmp_path, vocabulary, texts, steps=40)
    losses = [run.train_step() for _ in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.0


def test_resumed_run_is_identical(tmp_path, vocabulary, texts):
    whole = start(tmp_path / "whole", vocabulary, texts)
    train(whole, lambda run: 0.0)
    part = start(tmp_path / "part", vocabulary, texts)
    for _ in range(3):
        part.train_step()
    part.save()
    again = start(tmp_path / "part", vocabulary, texts)
    assert again.resume()
    assert again.step == 3
    train(again, lambda run: 0.0)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
        assert torch.equal(whole.average[name], again.average[name]), name


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)])
def test_export_round_trip(tmp_path, vocabulary, texts, kind, tolerance):
    run = start(tmp_path, vocabulary, texts)
    for _ in range(4):
        run.train_step()
    write_gguf(tmp_path / "m.gguf", run.shape, run.model.state_dict(), vocabulary, kind)
    model, pieces = read_gguf(tmp_path / "m.gguf")
    assert len(pieces) == len(vocabulary)
    for name, tensor in run.model.state_dict().items():
        error = (model.state_dict()[name] - tensor).abs().max()
        assert error <= tolerance * max(tensor.abs().max(), 1e-6), name
    tokens = torch.tensor([[vocabulary.bos, *vocabulary.encode("Once upon a time, Tom")]])
    with torch.no_grad():
        expected, found = run.model(tokens), model(tokens)
    assert (expected - found).abs().max() <= 5 * tolerance * expected.abs().max()


def test_start_from_gguf_wants_the_same_vocabulary(tmp_path, vocabulary, texts):
    run = start(tmp_path / "a", vocabulary, texts)
    run.train_step()
    write_gguf(tmp_path / "m.gguf", run.shape, run.model.state_dict(), vocabulary, "f32")
    again = start(tmp_path / "b", vocabulary, texts)
    again.start_from([tmp_path / "m.gguf"])
    assert torch.equal(again.model.token_embd, run.model.token_embd)
    assert again.plan.depth(0, 3) == 3
    words = " ".join(tasks.WORDS + tasks.NAMES)
    other = Vocabulary(train_vocabulary([words, "Quite other words make quite another vocabulary."], 448))
    with pytest.raises(SystemExit, match="another vocabulary"):
        start(tmp_path / "c", other, texts).start_from([tmp_path / "m.gguf"])


def test_a_run_starts_from_the_mean_of_several_ggufs(tmp_path, vocabulary, texts):
    run = start(tmp_path / "a", vocabulary, texts)
    found = []
    for name in ("early", "late"):
        run.train_step()
        write_gguf(tmp_path / f"{name}.gguf", run.shape, run.model.state_dict(), vocabulary, "f32")
        found.append(run.model.output_norm.detach().clone())
    again = start(tmp_path / "b", vocabulary, texts)
    again.start_from([tmp_path / "early.gguf", tmp_path / "late.gguf"])
    assert not torch.equal(*found)
    torch.testing.assert_close(again.model.output_norm.detach(), (found[0] + found[1]) / 2)


def test_products_in_bf16_train_too(tmp_path, vocabulary, texts):
    run = start(tmp_path, vocabulary, texts, steps=40)
    run.bf16 = True
    losses = [run.train_step() for _ in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.0


def test_short_rows_attend_as_long_ones_do():
    q, k, v = (
        torch.randn(2, heads, 9, 64, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 1)
    )
    v = v.expand(2, 2, 9, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v), expected)


def test_gguf_says_what_an_engine_needs(tmp_path, vocabulary):
    write_gguf(tmp_path / "m.gguf", SHAPES["test"], Llama(SHAPES["test"]).state_dict(), vocabulary)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert fields["cmr.early_exit_layers"].contents() == [1, 2]
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    assert types[vocabulary.end] == gguf.TokenType.CONTROL
    assert types[vocabulary.model.piece_to_id("<think>")] == gguf.TokenType.USER_DEFINED
    assert types.count(gguf.TokenType.BYTE) == 256
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}


def test_interleaved_rows_pair_as_gguf_rotates():
    rows = np.arange(128, dtype=np.float32).reshape(128, 1)
    assert interleave(rows, 64)[:4, 0].tolist() == [0, 32, 1, 33]
    assert (separate(interleave(rows, 64), 64) == rows).all()


def test_early_exit_is_a_prefix_of_the_model():
    model = Llama(SHAPES["test"])
    tokens = torch.arange(10)[None]
    kept = model.hidden(tokens, (1, 2))
    assert torch.equal(model(tokens, 2), model.head(kept[2]))
    assert torch.equal(model.hidden(tokens, skip={2})[3], kept[2])


def test_tasks_hold_their_answers(vocabulary, texts):
    rng = random.Random(3)
    for task in tasks.MIX:
        for _ in range(20):
            doc = task(rng, lambda chars: "Tom had a ball and a cat. " * (1 + chars // 26), 400)
            assert any(weight >= 1 for _, weight in doc), task
    doc = tasks.recall(rng, lambda chars: "It rained.", 200)
    text = "".join(part for part, _ in doc)
    for line in (part for part, weight in doc if weight == 3.0):
        assert text.count(line) >= 2


def test_documents_are_encoded_as_a_user_would_write_them(vocabulary, texts):
    rng, rows = random.Random(4), Rows(vocabulary, {})
    for task in tasks.MIX:
        doc = task(rng, lambda chars: "Tom\u2019s caf\u00e9 had a ball. " * (1 + chars // 22), 400)
        pairs = rows.encode(doc)
        text = "".join(part for part, _ in doc)
        for mark in vocabulary.marks:
            text = text.replace(mark, "\0")
        plain = [i for part in text.split("\0") for i in vocabulary.encode(part)]
        assert [i for i, _ in pairs if i not in vocabulary.marks.values()] == plain, task
    pairs = rows.encode([("Tom \u00e9", 0.5), (" ball", 2.0), ("<|end|>", 0.0), (" cat", 1.0)])
    said = {weight: vocabulary.decode(i for i, w in pairs if w == weight) for weight in (0.5, 2.0, 1.0)}
    assert said == {0.5: "Tom \u00e9", 2.0: " ball", 1.0: " cat"}


def test_rows_are_full_and_weighted(vocabulary, texts):
    rows = Rows(vocabulary, {"stories": [np.array(vocabulary.encode(t), np.uint16) for t in texts]}, seed=5)
    tokens, weights = rows.batch(16, 128)
    assert tokens.shape == (16, 129)
    assert weights.shape == (16, 128)
    assert 0 <= tokens.min() <= tokens.max() < len(vocabulary)
    assert set(np.unique(weights)) >= {0.0, 1.0}


def test_truecaser_restores_names_and_sentences():
    caser = Truecaser(["Tom met Lily. The cat saw Lily and her mom.", "A cat ran to Tom."])
    text = 'the cat met tom. "i like lily," it said. a bird named roxy came. roxy sang.'
    expected = 'The cat met Tom. "I like Lily," it said. A bird named Roxy came. Roxy sang.'
    assert caser.restore(text) == expected


def test_lower_case_copies_of_known_stories_are_dropped(tmp_path):
    story = "Tom had a red ball that he liked very much. " * 6
    other = "lily saw a small bird in the tall tree outside. " * 6
    (tmp_path / "tinystories-train-2.1MB.txt").write_text(story + "\n<|endoftext|>\n")
    (tmp_path / "tinystories-train-lowercase-4.2MB.txt").write_text(story.lower() + "\n" + other)
    stories = read_sources(tmp_path)["stories"]
    assert len(stories) == 2
    assert stories[1].startswith("Lily saw a small bird")
