"""Random models: the same bytes for a seed, weights of the right spread, files that the engine runs."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from tests.tool_files import load_tool

import cmr
from cmr.deltanet import DeltaNet
from cmr.quants import format_by_name

tool = load_tool("random_model")


@pytest.mark.parametrize("file_type", ["q4_k_m", "q4_0", "q8_0", "f16"])
def test_a_random_model_runs_and_says_different_things(tmp_path, file_type):
    path = tool.random_model(tmp_path / "new" / "a.gguf", "small", file_type)
    model = cmr.open_model(path, device="portable")
    logits = model.logits([1, 5, 300])
    model.close()
    assert np.isfinite(logits).all() and 1 < logits.std() < 10
    assert len(set(logits.argmax(1).tolist())) > 1


def test_a_random_model_with_recurrent_layers_runs(tmp_path):
    small = {
        "embd": 256,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 128,
        "rotated": 32,
        "ffn": 256,
        "shared": 256,
    }
    shape = replace(
        tool.SHAPES["qwen3-next"], **small, vocab=1024, experts=4, used=2, delta=DeltaNet(2, 4, 64, 64, 4)
    )
    path = tmp_path / "a.gguf"
    tool.write(path, shape, "next", "q4_k_m", tool.made_up_vocabulary(shape.vocab), 1)
    model = cmr.open_model(path, device="portable")
    logits = model.logits([1, 5, 300])
    model.close()
    assert np.isfinite(logits).all() and 1 < logits.std() < 10
    assert model.config.delta == shape.delta and model.config.layer_kinds.count("recurrent") == 3


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first, second, third = (
        tool.random_model(tmp_path / f"{i}.gguf", "small", "q4_k_m", seed=seed).read_bytes()
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == second != third


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *tool.SCALES])
def test_weights_have_no_mean_and_the_spread_asked_for(name):
    blocks = tool.random_rows(np.random.default_rng(1), format_by_name(name), 64, 1024, 2.0)
    kind = gguf.GGMLQuantizationType[name]
    if name in ("F32", "F16"):
        weights = blocks.view({"F32": np.float32, "F16": np.float16}[name]).astype(np.float32)
    else:
        weights = gguf.quants.dequantize(blocks.reshape(64, -1), kind)
    spread = 2 / np.sqrt(1024)
    assert abs(weights.mean()) < 0.03 * spread
    assert weights.std() == pytest.approx(spread, rel=0.35)


def test_medium_files_mix_types_as_llama_cpp_does():
    rows = tool.tensors(tool.SHAPES["llama-3.2-1b"], "q4_k_m")
    rich = [
        int(name.split(".")[1]) for name, row in rows.items() if "ffn_down" in name and row[0].name == "Q6_K"
    ]
    assert rich == [0, 1, 4, 7, 10, 13, 14, 15]
    assert rows["token_embd.weight"][0].name == "Q6_K"
    assert rows["blk.0.attn_q.weight"][0].name == "Q4_K"


def test_a_vocabulary_is_copied_with_its_size(tmp_path):
    donor = tool.random_model(tmp_path / "donor.gguf", "small", "q8_0")
    tokens = cmr.open_tokenizer(donor)
    path = tool.random_model(tmp_path / "b.gguf", "small", "q4_0", vocab=donor)
    assert cmr.open_tokenizer(path).tokens == tokens.tokens
    assert tokens.decode(tokens.encode("once upon a time")) == "once upon a time"
