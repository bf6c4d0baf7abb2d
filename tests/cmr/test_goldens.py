"""Every architecture against the logits of transformers and llama.cpp on the same files."""

import re

import numpy as np
import pytest
from tests.feeding import error, feed, new_sequence, part_of, run

from cmr import open_model

NAMES = ["gemma2", "gemma3", "granite", "llama-spm", "llama3", "mistral", "olmo2", "phi3", "qwen2", "qwen3",
         "smollm3", "stablelm"]  # fmt: skip


@pytest.fixture(params=NAMES)
def golden(request, shared):
    """The recorded logits of one architecture: float32 [64, n_vocab] each."""
    return request.param, np.load(shared / "golden" / f"{request.param}.npz")


@pytest.fixture(scope="module")
def open_golden(shared, device):
    """Open a golden file by name; opened models are kept for the other tests."""
    opened = {}

    def open_it(name):
        if name not in opened:
            opened[name] = open_model(shared / "golden" / f"{name}.gguf", device=device)
        return opened[name]

    yield open_it
    for model in opened.values():
        model.close()


def agreement(logits, wanted):
    """On how many rows the likeliest token is the same."""
    return int((logits.argmax(1) == wanted.argmax(1)).sum())


def test_lossless_files_give_the_reference_logits(golden, open_golden):
    name, expected = golden
    logits = open_golden(f"{name}-f16").logits(expected["tokens"])
    # The bar is 1e-3; exact activations leave float32 rounding only.
    assert error(logits, expected["hf_f32"]) < 5e-5
    assert agreement(logits, expected["hf_f32"]) == len(logits)


def test_generated_tokens_give_the_reference_logits(golden, open_golden):
    name, expected = golden
    model, tokens = open_golden(f"{name}-f16"), expected["tokens"]
    seq = new_sequence(model, tokens)
    rows = run(model, [part_of(seq, 0, 40, prompt=True)])
    for index in range(40, len(tokens)):
        rows += run(model, [part_of(seq, index, index + 1, prompt=False)])
    assert error(np.concatenate(rows), expected["hf_f32"]) < 5e-5


def test_half_precision_caches_cost_little(golden, open_golden):
    name, expected = golden
    logits = open_golden(f"{name}-f16").logits(expected["tokens"], kv_dtype=np.float16)
    assert error(logits, expected["hf_f32"]) < 1e-3


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
def test_quantized_files_give_llama_cpps_logits(golden, open_golden, prompt):
    name, expected = golden
    tokens = expected["tokens"]
    model = open_golden(f"{name}-{expected['quant']}")
    logits = feed(model, tokens, [len(tokens)] if prompt else [1] * len(tokens), prompt)
    assert error(logits, expected["lcpp_quant"]) < 0.06
    theirs = agreement(expected["lcpp_quant"], expected["hf_f32"])
    # Near ties fall either way: two engines that round differently disagree on a few of 64 rows.
    assert agreement(logits, expected["hf_f32"]) >= theirs - 3


def test_quantized_files_agree_with_float_as_often_as_llama_cpps(shared, open_golden):
    ours = theirs = rows = 0
    for name in NAMES:
        expected = np.load(shared / "golden" / f"{name}.npz")
        logits = open_golden(f"{name}-{expected['quant']}").logits(expected["tokens"])
        ours += agreement(logits, expected["hf_f32"])
        theirs += agreement(expected["lcpp_quant"], expected["hf_f32"])
        rows += len(logits)
    assert ours >= theirs - 0.01 * rows


def test_a_trained_model_tells_its_story(shared, device):
    """200 greedy tokens from an empty prompt are the text that is written beside the model."""
    readme = (shared / "README.md").read_text("utf-8")
    story = "\n".join(re.findall(r"^> (.*)$", readme, re.M))
    model = open_model(shared / "models" / "stories260K-f32.gguf", device=device)
    seq = new_sequence(model, [model.tokenizer.bos], np.float16)
    for index in range(200):
        (logits,) = run(model, [part_of(seq, index, index + 1, prompt=index == 0)])
        seq.tokens.append(int(logits[0].argmax()))
    assert model.tokenizer.decode(seq.tokens[1:]).strip() == story
    model.close()
