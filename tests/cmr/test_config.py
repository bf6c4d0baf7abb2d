"""What a file says about its model, what the architecture adds, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.ggufs import write_gguf
from tests.models import RECIPES, Recipe, write_model

from cmr import open_model
from cmr.architectures import ARCHITECTURES
from cmr.config import read_config
from cmr.deltanet import DeltaNet
from cmr.errors import ModelError
from cmr.gguf_file import open_gguf
from cmr.ops import open_ops
from cmr.stats import token_bytes
from cmr.weights import Weights


@pytest.fixture
def config_of(tmp_path):
    """Write a recipe and read its Config."""

    def read(recipe, context=None, overrides=None):
        return read_config(open_gguf(write_model(tmp_path / "m.gguf", recipe)), context, overrides)

    return read


def test_sizes_come_from_the_file(config_of):
    config = config_of(RECIPES["sizes-by-layer"])
    assert (config.arch, config.name, config.n_layers, config.n_embd) == ("llama", "tiny", 3, 64)
    assert config.n_heads == (4, 6, 2) and config.n_kv_heads == (2, 3, 1) and config.n_ff == (96, 64, 128)
    assert config.kv_shape(1) == (3, 16, 32)
    assert config.n_vocab == 96 and config.n_ctx_train == config.n_ctx == 256


def test_a_context_replaces_the_trained_one(config_of):
    config = config_of(Recipe(), context=64)
    assert config.n_ctx == 64 and config.n_ctx_train == 256


def test_sizes_that_the_file_leaves_out_follow_from_the_others(tmp_path):
    path = write_model(tmp_path / "m.gguf", Recipe())
    file = open_gguf(path)
    for key in ("attention.key_length", "attention.value_length", "attention.head_count_kv"):
        del file.metadata[f"llama.{key}"]
    config = read_config(file)
    assert (config.head_dim, config.head_dim_v, config.n_kv_heads) == (16, 16, (4, 4, 4))


def test_a_context_below_one_is_refused(config_of):
    with pytest.raises(ModelError, match="a context of 0 tokens is not possible"):
        config_of(Recipe(), context=0)


def test_every_architecture_has_a_recipe_in_the_tests():
    assert {recipe.arch for recipe in RECIPES.values()} == set(ARCHITECTURES)


def test_windows_follow_the_architectures_period_or_the_files_pattern(config_of):
    assert config_of(RECIPES["gemma2"]).window == (7, 0, 7)
    assert config_of(RECIPES["gemma3"]).window == (9, 9, 9, 9, 9, 0, 9)
    assert config_of(RECIPES["gemma3-pattern"]).window == (0, 5, 0)
    assert config_of(RECIPES["phi3"]).window == (11, 11, 11)
    assert config_of(RECIPES["olmo3"]).window == (6, 6, 6, 0, 6)
    assert config_of(Recipe(meta={"attention.sliding_window": 9})).window == (0, 0, 0)
    period = {"attention.sliding_window": 9, "attention.sliding_window_pattern": 3}
    assert config_of(Recipe(meta=period)).window == (9, 9, 0)


def test_scales_that_no_key_states_come_from_the_architecture(config_of):
    gemma = config_of(RECIPES["gemma2"])
    assert gemma.embed_scale == 8.0 and gemma.attn_softcap == 2.0 and gemma.attention_scale == 0.25
    plain = Recipe(arch="gemma2", norms=RECIPES["gemma2"].norms, meta={"attention.sliding_window": 4})
    assert (config_of(plain).attn_softcap, config_of(plain).logit_softcap) == (50.0, 30.0)
    granite = config_of(RECIPES["granite"])
    assert granite.logit_scale == 0.25 and granite.residual_scale == pytest.approx(0.3)


def test_the_largest_gemmas_scale_scores_by_width(config_of):
    recipe = Recipe(arch="gemma2", layers=46, width=32, heads=2, kv_heads=1, norms=RECIPES["gemma2"].norms)
    assert config_of(recipe).attention_scale == 1 / math.sqrt(32 / 2)
    other = Recipe(arch="gemma2", layers=3, width=32, heads=2, kv_heads=1, dim=8, norms=recipe.norms)
    assert config_of(other).attention_scale == 1 / math.sqrt(8)


def test_layers_without_rotation_have_no_rope(config_of):
    assert [rope is None for rope in config_of(RECIPES["smollm3"]).rope] == [False, False, False, True, False]
    assert set(config_of(RECIPES["granite-unrotated"]).rope) == {None}


def test_window_layers_rotate_unscaled_at_their_own_base(config_of):
    config = config_of(RECIPES["gemma3"])
    near, far = config.rope[0], config.rope[5]
    assert (near.base, near.factor, far.base, far.factor) == (5000.0, 1.0, 1000000.0, 8.0)
    assert config.rope[1] is near


def test_long_factors_serve_long_contexts(config_of):
    recipe = RECIPES["phi3-long"]
    long, short = config_of(recipe).rope[0], config_of(recipe, context=128).rope[0]
    assert long.rot == short.rot == 12 and long.magnitude == pytest.approx(1.19)
    assert not np.array_equal(long.factors, short.factors)


def test_parallel_blocks_are_detected_by_their_norms(config_of):
    assert config_of(RECIPES["stablelm-parallel"]).parallel_residual
    # The converter writes use_parallel_residual for models that have none: the norms decide.
    assert not config_of(RECIPES["stablelm"]).parallel_residual


def test_overrides_replace_metadata(config_of):
    config = config_of(
        Recipe(), overrides={"llama.rope.freq_base": 5e5, "tokenizer.ggml.add_bos_token": True}
    )
    assert config.rope[0].base == 5e5


def test_an_override_that_nothing_reads_is_refused(config_of):
    with pytest.raises(
        ModelError, match=r"nothing reads the overridden key 'llama\.rope\.freq'.*llama\.rope\.freq_base"
    ):
        config_of(Recipe(), overrides={"llama.rope.freq": 1.0})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", None, "llama.block_count is missing"),
        ("block_count", 10**6, "llama.block_count is 1000000; a whole number from 1 to"),
        ("block_count", "three", "llama.block_count is 'three'; a whole number"),
        ("embedding_length", 0, "llama.embedding_length is 0"),
        ("attention.head_count_kv", 3, "llama.attention.head_count_kv is 3, which does not divide 4 heads"),
        (
            "attention.head_count",
            np.array([4, 4], np.int32),
            r"is \[4, 4\]; 3 positive whole numbers are needed",
        ),
        ("attention.layer_norm_rms_epsilon", "small", "is 'small'; a number above zero"),
        ("rope.dimension_count", 7, "rope.dimension_count is 7; an even number"),
        ("rope.dimension_count", 64, "rope.dimension_count is 64; a whole number from 0 to 16"),
        ("rope.freq_base", float("nan"), "rope.freq_base is nan"),
        ("rope.freq_base", 1.0, "rope.freq_base is 1.0; a number above 1"),
        ("rope.freq_base_swa", -2.0, "rope.freq_base_swa is -2.0; a number above 1"),
        ("rope.scaling.factor", -1.0, "rope.scaling.factor is -1.0; a number above zero"),
        (
            "rope.scaling.type",
            "stretch",
            "rope.scaling.type is 'stretch'; there are: none, linear, yarn, longrope",
        ),
        ("attention.sliding_window_pattern", np.array([True]), "has 1 entries for 3 layers"),
    ],
)
def test_bad_metadata_are_refused_in_one_sentence(tmp_path, key, value, message):
    file = open_gguf(write_model(tmp_path / "m.gguf", Recipe()))
    if value is None:
        del file.metadata[f"llama.{key}"]
    else:
        file.metadata[f"llama.{key}"] = value
    with pytest.raises(ModelError, match=message) as caught:
        read_config(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-long", "yarn", "granite", "olmo3"])
def test_any_values_give_a_model_or_a_sentence(tmp_path, name):
    file = open_gguf(write_model(tmp_path / "m.gguf", RECIPES[name]))
    rng, good = np.random.default_rng(0), dict(file.metadata)
    odd = [
        None,
        0,
        -1,
        1,
        2,
        3,
        7,
        2**31,
        2**63,
        0.0,
        -1.5,
        1e-320,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x",
    ]
    odd += [True, np.zeros(0, np.int32), np.arange(3), np.array([1.5] * 3), np.array([True] * 3), [b"a"]]
    ops = open_ops("portable")
    keys = [key for key in good if key.count(".") and not key.startswith("general.")]
    for _ in range(300):
        file.metadata = good | {
            rng.choice(keys): odd[rng.integers(len(odd))] for _ in range(rng.integers(1, 4))
        }
        try:
            config = read_config(file)
            Weights(ops, config, file.tensors)
            with np.errstate(all="ignore"):
                assert all(rope is None or rope.inv_freq().shape == (rope.rot // 2,) for rope in config.rope)
        except ModelError as error:
            assert str(error) and "\n" not in str(error)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "foo"}, {"w": np.ones(4, np.float32)})
    with pytest.raises(
        ModelError, match="architecture 'foo' is not supported; there are: deepseek, dots1, ernie4_5, "
    ):
        read_config(open_gguf(path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", None, "expert_count is missing"),
        ("expert_used_count", None, "expert_used_count is missing"),
        ("expert_used_count", 21, "expert_used_count is 21; a whole number from 1 to 20"),
        ("expert_used_count", 0, "expert_used_count is 0; a whole number from 1 to 20"),
        ("expert_count", 0, "expert_count is 0; a whole number from 1 to 65536"),
        ("expert_count", 1 << 31, "expert_count is 2147483648; a whole number from 1 to 65536"),
        (
            "expert_gating_func",
            4,
            r"expert_gating_func is 4; softmax \(1 and 3\) and sigmoid \(2\) are supported",
        ),
        ("expert_group_count", 4, "expert_group_count is 4; experts in groups are not supported"),
    ],
)
def test_experts_that_cannot_be_chosen_are_refused(tmp_path, key, value, message):
    file = open_gguf(write_model(tmp_path / "m.gguf", RECIPES["qwen3moe"]))
    file.metadata.pop(f"qwen3moe.{key}", None)
    if value is not None:
        file.metadata[f"qwen3moe.{key}"] = value
    with pytest.raises(ModelError, match=message):
        read_config(file)


def test_a_dense_file_that_counts_experts_is_dense(config_of):
    config = config_of(Recipe(meta={"expert_count": 8, "expert_used_count": 2}))
    assert config.router is None and not config.routed and not config.features


def test_a_softmax_over_the_chosen_is_normalized_whatever_else_is_said(config_of):
    for gating, normalized in ((0, False), (1, False), (3, True)):
        meta = {"expert_gating_func": gating, "expert_weights_norm": False}
        assert config_of(replace(RECIPES["olmoe"], meta=meta)).router.normalized is normalized


def test_layers_of_experts_are_told_by_their_tensors(config_of):
    config = config_of(RECIPES["qwen3moe"])
    assert config.routed == {0, 2} and config.n_ff == (32, 96, 32)
    assert config.router == (20, 6, True, 1.0, False) and config.features == {"experts"}
    assert not config_of(RECIPES["olmoe"]).router.normalized
    assert config_of(RECIPES["gpt-oss"]).features == {"experts", "sink_logits", "swiglu_oai"}


def test_recurrent_layers_have_sizes_of_their_own(config_of):
    config = config_of(RECIPES["qwen3next"])
    assert config.layer_kinds == ("recurrent",) * 3 + ("attention",)
    assert config.n_heads == (0, 0, 0, 4) and config.n_kv_heads == (0, 0, 0, 2)
    assert [config.kv_shape(layer)[0] for layer in range(4)] == [0, 0, 0, 2]
    assert [rope is None for rope in config.rope] == [True] * 3 + [False] and config.rope[3].rot == 4
    assert config.delta == DeltaNet(2, 4, 16, 16, 4) and config.delta.inputs == 3 * 64 + 2 * 4
    assert config.features == {"delta_net", "experts", "gated_attention"}
    assert config_of(RECIPES["qwen3next-odd"]).layer_kinds == ("attention", "recurrent", "recurrent")
    assert config_of(RECIPES["qwen35"]).delta.tiled
    plain = config_of(Recipe())
    assert plain.layer_kinds == ("attention",) * 3 and plain.delta is None and not plain.features


def test_blocks_that_only_draft_are_left_alone(tmp_path):
    from tests.models import _Maker

    recipe = RECIPES["qwen3next"]
    maker = _Maker(recipe, np.random.default_rng(0))
    tensors = maker.tensors() | {"blk.4.nextn.eh_proj.weight": np.ones((64, 128), np.float32)}
    more = {"qwen3next.block_count": 5, "qwen3next.nextn_predict_layers": 1}
    model = open_model(write_gguf(tmp_path / "m.gguf", maker.metadata() | more, tensors), device="portable")
    plain = open_model(write_model(tmp_path / "plain.gguf", recipe), device="portable")
    assert model.n_layers == 4 and model.config.n_drafting == 1
    np.testing.assert_array_equal(model.logits(range(9)), plain.logits(range(9)))
    assert token_bytes(model) == token_bytes(plain)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("qwen3next", "ssm.group_count", 3, "ssm.group_count is 3, which does not divide 4"),
        ("qwen3next", "ssm.time_step_rank", 6, "ssm.time_step_rank is 6, which does not divide 64"),
        ("qwen3next", "ssm.state_size", None, "ssm.state_size is missing"),
        ("qwen3next", "ssm.conv_kernel", 0, "ssm.conv_kernel is 0; a whole number from 1 to 64 is needed"),
        ("qwen3next", "attention.value_length", 32, "value_length is 32; gates have 16"),
        ("qwen3next", "full_attention_interval", 0, "full_attention_interval is 0; a whole number from 1"),
        ("qwen3next", "nextn_predict_layers", 4, "nextn_predict_layers is 4; a whole number from 0 to 3"),
        (
            "qwen3next-odd",
            "attention.recurrent_layers",
            np.ones(2, bool),
            "has to be a truth value for each of 3",
        ),
        ("qwen3next-odd", "attention.recurrent_layers", True, "has to be a truth value for each of 3"),
        ("qwen35", "rope.dimension_sections", np.array([1, 1, 1, 9]), r"is \[1, 1, 1, 9\]; 4 pairs rotate"),
        ("qwen35", "rope.dimension_sections", "all", r"is \[\]; 4 pairs rotate"),
    ],
)
def test_what_a_recurrent_model_cannot_be_is_refused(tmp_path, name, key, value, message):
    file = open_gguf(write_model(tmp_path / "m.gguf", RECIPES[name]))
    key = f"{RECIPES[name].arch}.{key}"
    file.metadata.pop(key, None)
    if value is not None:
        file.metadata[key] = value
    with pytest.raises(ModelError, match=message):
        read_config(file)


@pytest.mark.parametrize(
    ("recipe", "name", "shape", "message"),
    [
        ("qwen3next", "blk.0.ssm_a", None, "the tensor blk.0.ssm_a is missing"),
        ("qwen3next", "blk.0.ssm_a", (5,), "the tensor blk.0.ssm_a is 5; 4 is needed"),
        ("qwen3next", "blk.0.ssm_a.weight", (4,), "blk.0.ssm_a.weight has no place"),
        ("qwen3next", "blk.1.ssm_dt.bias", None, "the tensor blk.1.ssm_dt.bias is missing"),
        ("qwen3next", "blk.1.ssm_dt.bias", (3,), "the tensor blk.1.ssm_dt.bias is 3; 4 is needed"),
        ("qwen3next", "blk.1.ssm_ba.weight", (4, 64), "blk.1.ssm_ba.weight is 4 x 64; 8 x 64 is needed"),
        ("qwen3next", "blk.1.ssm_conv1d.weight", (128, 3), "ssm_conv1d.weight is 128 x 3; 128 x 4 is needed"),
        ("qwen3next", "blk.1.ssm_conv1d.bias", (128,), "blk.1.ssm_conv1d.bias has no place"),
        ("qwen3next", "blk.1.attn_gate.weight", None, "the tensor blk.1.attn_gate.weight is missing"),
        ("qwen3next", "blk.1.attn_qkv.weight", None, "the tensor blk.1.ssm_in.weight is missing"),
        ("qwen3next", "blk.1.attn_q.weight", (64, 64), "blk.1.attn_q.weight has no place"),
        ("qwen3next", "blk.3.attn_q.weight", (64, 64), "blk.3.attn_q.weight is 64 x 64; 128 x 64 is needed"),
        ("qwen3next", "blk.3.attn_q_norm.weight", None, "the tensor blk.3.attn_q_norm.weight is missing"),
        ("qwen3next", "blk.3.ssm_out.weight", (64, 64), "blk.3.ssm_out.weight has no place"),
        ("qwen35", "blk.0.ssm_alpha.weight", None, "the tensor blk.0.ssm_alpha.weight is missing"),
        ("qwen35", "blk.0.ssm_ba.weight", (12, 64), "blk.0.ssm_ba.weight has no place"),
        ("qwen35", "blk.5.attn_q.weight", (64, 64), "blk.5.attn_q.weight has no place"),
    ],
)
def test_tensors_of_recurrent_layers_that_do_not_fit_are_named(tmp_path, recipe, name, shape, message):
    with pytest.raises(ModelError, match=message):
        check_changed(tmp_path, RECIPES[recipe], {name: shape})


def test_sinks_are_one_for_each_head(tmp_path):
    from tests.models import _Maker

    maker = _Maker(Recipe(), np.random.default_rng(0))
    tensors = maker.tensors() | {"blk.1.attn_sinks.weight": np.ones(5, np.float32)}
    with pytest.raises(ModelError, match="blk.1.attn_sinks.weight has 5 logits; 4 are needed"):
        read_config(open_gguf(write_gguf(tmp_path / "m.gguf", maker.metadata(), tensors)))


def test_a_vocabulary_without_weights_is_no_model(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"})
    with pytest.raises(ModelError, match="holds no language model"):
        read_config(open_gguf(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.attn_k.weight": None}, "the tensor blk.1.attn_k.weight is missing"),
        ({"blk.2.ffn_norm.weight": None}, "the tensor blk.2.ffn_norm.weight is missing"),
        ({"output_norm.weight": None}, "the tensor output_norm.weight is missing"),
        ({"blk.0.attn_q.weight": (64, 32)}, "blk.0.attn_q.weight is 64 x 32; 64 x 64 is needed"),
        ({"blk.0.ffn_gate.weight": None}, "blk.0.ffn_up.weight is 96 x 64; 192 x 64 is needed"),
        ({"output.weight": (90, 64)}, "output.weight is 90 x 64; 96 x 64 is needed"),
        ({"blk.0.attn_q.bias": (60,)}, "blk.0.attn_q.bias is 60; 64 is needed"),
        ({"blk.1.attn_q_norm.weight": (32,)}, "blk.1.attn_q_norm.weight is 32; 16 is needed"),
        (
            {"blk.1.attn_sub_norm.weight": (64,)},
            "blk.1.attn_sub_norm.weight has no place in a model of architecture 'llama'",
        ),
        ({"position_embd.weight": (256, 64)}, "position_embd.weight has no place"),
        ({"blk.7.attn_q.weight": (64, 64)}, "blk.7.attn_q.weight has no place"),
        ({"rope_freqs.weight": (4,)}, "rope_freqs.weight has 4 factors; 8 are needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        check_changed(tmp_path, Recipe(), change)


def check_changed(folder, recipe, change):
    """Read a model of which tensors are left out, or made of another shape."""
    from tests.models import _Maker

    maker = _Maker(recipe, np.random.default_rng(0))
    tensors = maker.tensors()
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = np.ones(shape, np.float32)
    file = open_gguf(write_gguf(folder / "m.gguf", maker.metadata(), tensors))
    Weights(open_ops("portable"), read_config(file), file.tensors)


@pytest.mark.parametrize(
    ("arch", "name", "shape", "message"),
    [
        ("qwen3moe", "ffn_gate_exps", None, "the tensor blk.0.ffn_gate_exps.weight is missing"),
        ("qwen3moe", "ffn_gate_exps", (19, 32, 64), "ffn_gate_exps.weight is 19 x 32 x 64; 20 x 32 x 64 is"),
        ("qwen3moe", "ffn_down_exps", (20, 64, 16), "ffn_down_exps.weight is 20 x 64 x 16; 20 x 64 x 32 is"),
        ("qwen3moe", "ffn_up_exps", (640, 64), "ffn_up_exps.weight is 640 x 64; 20 x 32 x 64 is needed"),
        ("qwen3moe", "ffn_gate_inp", (21, 64), "ffn_gate_inp.weight is 21 x 64; 20 x 64 is needed"),
        ("qwen3moe", "ffn_up_shexp", (32, 64), "blk.0.ffn_gate_shexp.weight is missing"),
        ("qwen3moe", "ffn_up_chexps", (20, 32, 64), "blk.0.ffn_up_chexps.weight has no place in a model"),
        ("qwen3moe", "exp_probs_b", (20,), "blk.0.exp_probs_b.weight has no place in a model"),
        ("qwen2moe", "ffn_up_shexp", (32, 64), "blk.0.ffn_gate_shexp.weight is 64 x 64; 32 x 64 is needed"),
        ("qwen3moe", "ffn_up", (96, 64), "blk.0.ffn_up.weight has no place in a model"),
        ("gpt-oss", "ffn_norm", (64,), "blk.0.ffn_norm.weight has no place in a model"),
    ],
)
def test_tensors_of_experts_that_do_not_fit_are_named(tmp_path, arch, name, shape, message):
    with pytest.raises(ModelError, match=message):
        check_changed(tmp_path, RECIPES[arch], {f"blk.0.{name}.weight": shape})


def test_what_stands_for_a_missing_tensor_is_named_instead_of_it(tmp_path):
    fused = {"blk.0.ffn_gate_exps.weight": None, "blk.0.ffn_gate_up_exps.weight": (20, 64, 64)}
    with pytest.raises(
        ModelError, match=r"blk.0.ffn_gate_up_exps.weight has no place in a model of .*qwen3moe"
    ):
        check_changed(tmp_path, RECIPES["qwen3moe"], fused)


def test_unsupported_tensor_types_are_named(tmp_path):
    from tests.ggufs import Blocks
    from tests.models import _Maker

    maker = _Maker(Recipe(width=256, dim=64, dim_v=64, layers=1), np.random.default_rng(0))
    tensors = maker.tensors() | {"blk.0.attn_q.weight": Blocks(16, (256, 256), bytes(256 * 66))}
    file = open_gguf(write_gguf(tmp_path / "m.gguf", maker.metadata(), tensors))
    with pytest.raises(
        ModelError, match="blk.0.attn_q.weight has the unsupported type IQ2_XXS; there are: F32 F16 Q4_0"
    ):
        Weights(open_ops("portable"), read_config(file), file.tensors)
    tensors["blk.0.attn_q.weight"] = np.ones((256, 256), np.float32)
    tensors["blk.0.ffn_norm.weight"] = Blocks("Q8_0", (256,), bytes(8 * 34))
    file = open_gguf(write_gguf(tmp_path / "m.gguf", maker.metadata(), tensors))
    with pytest.raises(
        ModelError, match="blk.0.ffn_norm.weight has the unsupported type Q8_0; there are: F32 F16 BF16"
    ):
        Weights(open_ops("portable"), read_config(file), file.tensors)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(config_of):
    rope = config_of(RECIPES["yarn"]).rope[0]
    plain = rope.base ** -(np.arange(0, 16, 2) / 16)
    ratio = rope.inv_freq() / plain
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 4) and np.all(np.diff(ratio) <= 0)
    assert rope.magnitude == pytest.approx(0.1 * math.log(4) + 1)
