"""The forward pass against a float64 reference, and the promises that the token loop builds on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tests.feeding import error, feed, new_sequence, part_of, run
from tests.ggufs import write_gguf
from tests.models import RECIPES, VOCAB, Recipe, write_model
from tests.reference import Reference

from cmr import open_model
from cmr.arena import Arena, arena_bytes, products
from cmr.errors import CMRError, ModelError, RequestError
from cmr.model import plain_plan
from cmr.ops.records import Buffer
from cmr.quants import FORMATS
from cmr.sequence import Step
from cmr.weights import build_layer

TOKENS = np.random.default_rng(1).integers(0, VOCAB, 41).astype(np.int32)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, device):
    """Open the model of a recipe, by name or given; models are shared between tests."""
    folder, opened = tmp_path_factory.mktemp("models"), {}

    def get(recipe):
        recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        key = repr(recipe)
        if key not in opened:
            path = write_model(folder / f"{len(opened)}.gguf", recipe)
            opened[key] = open_model(path, threads=2, device=device)
        return opened[key]

    yield get
    for model in opened.values():
        model.close()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
def test_logits_are_those_of_the_reference(model_of, name, prompt):
    model = model_of(name)
    logits = feed(model, TOKENS, [len(TOKENS)] if prompt else [1] * len(TOKENS), prompt)
    assert error(logits, Reference(model.path).logits(TOKENS)) < 1e-5


def test_a_short_context_takes_the_short_factors(tmp_path, device):
    path = write_model(tmp_path / "m.gguf", RECIPES["phi3-long"])
    logits = {}
    for context in (100, 256):
        model = open_model(path, device=device, context=context)
        logits[context] = model.logits(TOKENS)
        assert error(logits[context], Reference(path, context).logits(TOKENS)) < 1e-5
        model.close()
    assert error(logits[100], logits[256]) > 1e-3


WIDE = Recipe(layers=2, width=256, heads=4, dim=64, dim_v=64, inner=256)
EXPERTS = replace(WIDE, arch="qwen3moe", head_norms="one", experts=(9, 3), expert_inner=256)


@pytest.mark.parametrize("sizes", [WIDE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("type", [format.name for format in FORMATS.values()])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
def test_every_tensor_type_runs(model_of, sizes, type, prompt):
    recipe = replace(sizes, type=type)
    model = model_of(recipe)
    logits = feed(model, TOKENS, [len(TOKENS)] if prompt else [1] * len(TOKENS), prompt)
    exact = type in ("F32", "F16", "BF16") or model.ops.name == "portable"
    # Int8 activations cost a few percent on random models, whose logits have no margin.
    assert error(logits, Reference(model.path).logits(TOKENS)) < (1e-5 if exact else 0.05)


BITWISE = [
    "llama-biases",
    "gemma2",
    "phi3",
    "stablelm-parallel",
    "sizes-by-layer",
    "qwen3moe",
    "qwen2moe",
    "dots1",
    "granitemoe",
    "qwen3next",
    "qwen3next-odd",
]
QUANTIZED = [replace(WIDE, type=type) for type in ("Q4_0", "Q4_K", "Q6_K", "F16")]
QUANTIZED += [replace(EXPERTS, type=type) for type in ("Q8_0", "Q4_K")]


def _named(recipe):
    return recipe if isinstance(recipe, str) else f"{recipe.arch}-{recipe.type}"


@pytest.mark.parametrize("recipe", [*BITWISE, *QUANTIZED], ids=_named)
class TestRowsDoNotDependOnTheirCompany:
    """A row's logits depend on its role and position alone, bit for bit."""

    def test_a_prompt_in_chunks_is_the_prompt_in_one(self, model_of, recipe):
        model = model_of(recipe)
        whole = feed(model, TOKENS, [len(TOKENS)], prompt=True)
        for sizes in ([1] * 5 + [36], [7] * 5 + [6], [32, 9]):
            np.testing.assert_array_equal(feed(model, TOKENS, sizes, prompt=True), whole)

    def test_generated_tokens_together_are_the_same_one_by_one(self, model_of, recipe):
        model = model_of(recipe)
        alone = feed(model, TOKENS, [1] * len(TOKENS), prompt=False)
        for sizes in ([2] * 3 + [3] * 3 + [5, 8, 13], [16, 16, 9]):
            np.testing.assert_array_equal(feed(model, TOKENS, sizes, prompt=False), alone)

    def test_sequences_in_one_step_are_the_same_alone(self, model_of, recipe):
        model = model_of(recipe)
        others = [np.roll(TOKENS, shift) for shift in (3, 11)]

        def steps(sequences):
            """A long prompt first; then its tokens, beside the other's prompt in pieces."""
            made = {0: [], 1: []}
            schedule = [
                ((0, 0, 20, True),),
                ((0, 20, 21, False), (1, 0, 9, True)),
                ((1, 9, 17, True), (0, 21, 24, False)),
                ((0, 24, 25, False), (1, 17, 18, False)),
            ]
            for entries in schedule:
                chosen = [entry for entry in entries if sequences[entry[0]] is not None]
                if chosen:
                    parts = [part_of(sequences[who], a, b, prompt) for who, a, b, prompt in chosen]
                    for (who, *_), rows in zip(chosen, run(model, parts), strict=True):
                        made[who].append(rows)
            return made

        both = steps([new_sequence(model, tokens) for tokens in others])
        for who in (0, 1):
            alone = [new_sequence(model, tokens) if i == who else None for i, tokens in enumerate(others)]
            for found, wanted in zip(both[who], steps(alone)[who], strict=True):
                np.testing.assert_array_equal(found, wanted)

    def test_threads_change_nothing(self, model_of, recipe, device):
        model = model_of(recipe)
        single = open_model(model.path, threads=1, prompt_threads=1, device=device)
        np.testing.assert_array_equal(single.logits(TOKENS), model.logits(TOKENS))
        np.testing.assert_array_equal(
            feed(single, TOKENS, [1] * len(TOKENS), False), feed(model, TOKENS, [1] * len(TOKENS), False)
        )
        single.close()


def test_only_wanted_rows_get_logits(model_of):
    model = model_of("llama")
    whole = model.logits(TOKENS)
    first, second = (new_sequence(model, TOKENS) for _ in range(2))
    last, none = run(model, [part_of(first, 0, 41, True, want=2), part_of(second, 0, 5, True, want=0)])
    np.testing.assert_array_equal(last, whole[-2:])
    assert none.shape == (0, VOCAB)


def test_steps_longer_than_the_buffers_are_served(model_of):
    model = model_of("llama")
    tokens = np.tile(TOKENS, 14)[:530]
    np.testing.assert_array_equal(model.logits(tokens, chunk=530), model.logits(tokens))


def test_buffers_are_made_once(model_of):
    model = model_of("qwen3")
    seq = new_sequence(model, TOKENS)
    run(model, [part_of(seq, 0, 20, True)])
    arena = model._pass._arena
    before = [arena.hidden.addr, arena.qkv.addr, arena.logits.addr, arena.heads(0, slice(0, 1))[0]]
    for index in range(20, 41):
        run(model, [part_of(seq, index, index + 1, False)])
    assert model._pass._arena is arena
    after = [arena.hidden.addr, arena.qkv.addr, arena.logits.addr, arena.heads(0, slice(0, 1))[0]]
    assert all(a is b or a == b for a, b in zip(before, after, strict=True))


def test_a_step_recorded_on_buffers_that_are_gone_is_not_run_on_others(model_of):
    """Where new buffers lie at the addresses of old ones in part, the rest of them lie elsewhere."""
    model = model_of("qwen3moe")
    if not model.ops.replays:
        pytest.skip("no steps are recorded")
    plan, seq = plain_plan(model), new_sequence(model, TOKENS)
    for index in range(4):
        model.forward(plan, Step([part_of(seq, index, index + 1, False)]))
    assert plan.recorded
    old = model._pass._arena
    made = model._pass._arena = Arena(model.ops, model.config, old.rows)
    made.hidden, made.last, made.logits = old.hidden, old.last, old.logits
    for buffer in (made.qkv, made.inner):
        buffer.array[0] = np.nan
    model.forward(plan, Step([part_of(seq, 4, 5, False)]))
    assert np.isfinite(made.qkv.array[0]).all() and np.isfinite(made.inner.array[0]).all()


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "qwen2moe", "granitemoe", "sizes-by-layer"])
def test_activation_memory_is_foretold(model_of, name):
    model = model_of(name)
    for rows in (1, 512):
        arena = Arena(model.ops, model.config, rows)
        arena.want(1)
        sizes = [buffer.array.nbytes for buffer in vars(arena).values() if isinstance(buffer, Buffer)]
        if arena.routes:
            sizes += [array.nbytes for array in vars(arena.routes).values() if isinstance(array, np.ndarray)]
        assert sum(sizes) == arena.nbytes == arena_bytes(model.config, rows)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3moe", "qwen2moe", "gpt-oss", "granitemoe", "sizes-by-layer", "gemma2"]
)
def test_scratch_memory_is_foretold(model_of, name):
    recipe = replace(RECIPES[name], type="Q8_0", width=256, inner=512, context=512)
    model = model_of(recipe)
    model.logits(np.arange(512) % VOCAB, chunk=512)
    foretold = model.ops.scratch_bytes(products(model.config, 512))
    if model.ops.name != "cpu":
        assert foretold == 0
        return
    ops = model.ops
    taken = sum(scratch.size for scratch in (ops._x, ops._y, ops._space, ops._spread, ops._partials))
    assert foretold == pytest.approx(taken, rel=0.02)


def test_activation_memory_is_known(model_of):
    model = model_of("llama")
    widths = 64 + (4 * 16 + 2 * 2 * 16) + 64 + 96 + 64  # hidden, qkv, mixed, inner, spare
    assert model.activation_bytes >= 4 * 512 * widths


def test_tokens_outside_the_vocabulary_are_refused(model_of):
    model = model_of("llama")
    for tokens in ([1, VOCAB], [-1]):
        with pytest.raises(RequestError, match="is not in the vocabulary, which has ids 0 to 95"):
            model.logits(tokens)


def test_no_tokens_give_no_logits(model_of):
    assert model_of("llama").logits([]).shape == (0, VOCAB)


def test_opening_reads_no_layer(tmp_path, device):
    model = open_model(write_model(tmp_path / "m.gguf", Recipe()), device=device)
    assert model.weights.layers == [None, None, None]
    model.weights.acquire(1)
    assert [layer is None for layer in model.weights.layers] == [True, False, True]
    model.close()


def test_an_unsupported_model_is_closed_again(tmp_path, device, monkeypatch):
    closed = []
    monkeypatch.setattr("cmr.gguf_file.GGUFFile.close", lambda self: closed.append(self.path))
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "foo"}, {"w": np.ones(4, np.float32)})
    with pytest.raises(ModelError, match="architecture 'foo'"):
        open_model(path, device=device)
    assert closed == [path]


def test_what_a_device_does_not_compute_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("cmr.ops.portable.PortableOps.features", frozenset({"sink_logits"}))
    path = write_model(tmp_path / "m.gguf", RECIPES["gpt-oss"])
    with pytest.raises(
        ModelError, match="'portable' does not compute experts and swiglu_oai, which this model"
    ):
        open_model(path, device="portable")
    open_model(write_model(tmp_path / "s.gguf", RECIPES["sinks"]), device="portable").close()


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(CMRError, match="device 'abacus' is not supported; there are: cpu, cuda, portable"):
        open_model(write_model(tmp_path / "m.gguf", Recipe()), device="abacus")


def test_overrides_reach_the_metadata(tmp_path, device):
    path = write_model(tmp_path / "m.gguf", Recipe())
    model = open_model(
        path, device=device, overrides={"general.name": "renamed", "tokenizer.chat_template": "{{ 1 }}"}
    )
    assert (model.config.name, model.metadata["general.name"], model.chat_template) == (
        "renamed",
        "renamed",
        "{{ 1 }}",
    )
    model.close()


# -- plans --


def test_hooks_see_queries_and_hidden_rows(model_of):
    model = model_of("gemma2")
    seen, layers = [], []
    plan = SimpleNamespace(**vars(plain_plan(model)))
    plan.on_attention = [lambda seq, layer, q, cache: seen.append((seq, layer, q.shape, len(cache)))]
    plan.on_layer = [lambda step, layer, hidden: layers.append((layer, hidden.shape))]
    seq = new_sequence(model, TOKENS)
    run(model, [part_of(seq, 0, 12, True)], plan)
    assert seen == [(seq, layer, (12, 4, 16), 12) for layer in range(3)]
    assert layers == [(layer, (12, 64)) for layer in range(3)]


def test_a_true_answer_leaves_the_remaining_layers_out(model_of):
    model = model_of("llama")
    plan = SimpleNamespace(**vars(plain_plan(model)))
    asked = []
    plan.on_layer = [lambda step, layer, hidden: layer == 1, lambda step, layer, hidden: asked.append(layer)]
    (early,) = run(model, [part_of(new_sequence(model, TOKENS), 0, 9, True)], plan)
    cut = SimpleNamespace(**vars(plain_plan(model)) | {"layers": (0, 1)})
    (short,) = run(model, [part_of(new_sequence(model, TOKENS), 0, 9, True)], cut)
    assert asked == [0, 1]
    np.testing.assert_array_equal(early, short)


def test_attention_may_be_a_function(model_of):
    model = model_of("llama")
    plan = SimpleNamespace(**vars(plain_plan(model)))
    plan.attend = [lambda q, cache, q_pos, out, prompt: out.fill(0)] * 3
    (none,) = run(model, [part_of(new_sequence(model, TOKENS), 0, 9, True)], plan)
    # Without attention a token's logits do not depend on what came before it.
    (one,) = run(model, [part_of(new_sequence(model, TOKENS[8:]), 0, 1, True)], plan)
    np.testing.assert_array_equal(none[-1:], one)


class Elsewhere:
    """A weight source that copies each layer's matrices to other memory and forgets them on release."""

    def __init__(self, model):
        self.model, self.held, self.log = model, {}, []

    def acquire(self, layer):
        own = self.model.weights
        placed = {}
        for name, tensor in own.tensors(layer).items():
            self.held[name] = np.array(tensor.data)
            placed[name] = (tensor, self.held[name].ctypes.data)
        self.log.append(("acquire", layer))
        return build_layer(own.ops, own.config, layer, placed)

    def release(self, layer):
        self.held.clear()
        self.log.append(("release", layer))


@pytest.mark.parametrize("recipe", ["llama-biases", "phi3-biases", QUANTIZED[2]], ids=str)
def test_weights_may_lie_elsewhere(model_of, recipe):
    model = model_of(recipe)
    source = Elsewhere(model)
    plan = SimpleNamespace(**vars(plain_plan(model)) | {"weights": source})
    (streamed,) = run(model, [part_of(new_sequence(model, TOKENS), 0, 41, True)], plan)
    np.testing.assert_array_equal(streamed, model.logits(TOKENS, chunk=41))
    assert source.log[:4] == [("acquire", 0), ("release", 0), ("acquire", 1), ("release", 1)]


def test_a_layer_is_released_when_a_hook_fails(model_of):
    model = model_of("llama")
    source = Elsewhere(model)
    plan = SimpleNamespace(**vars(plain_plan(model)) | {"weights": source})

    def fail(*_):
        raise ZeroDivisionError

    plan.on_attention = [fail]
    with pytest.raises(ZeroDivisionError):
        run(model, [part_of(new_sequence(model, TOKENS), 0, 3, True)], plan)
    assert source.log == [("acquire", 0), ("release", 0)]


def test_bytes_read_for_a_token_are_counted(model_of):
    model = model_of(QUANTIZED[0])
    tensors = model.file.tensors
    matrices = [t.nbytes for name, t in tensors.items() if len(t.shape) == 2 and name != "token_embd.weight"]
    assert model.weights.token_bytes == sum(matrices)
