"""A model of two small layers on every device: the reference's logits, and the promises of the token loop."""

from contextlib import closing

import numpy as np
import pytest
from tests.feeding import error, feed, new_sequence, part_of, run
from tests.models import VOCAB, Recipe, write_model
from tests.reference import Reference

import cmr
from cmr import open_model
from cmr.kvcache import LayerCache
from cmr.model import plain_plan
from cmr.ops import open_ops
from cmr.sequence import Request, Sequence

RECIPE = Recipe(layers=2, width=32, heads=2, kv_heads=1, dim=32, dim_v=32, inner=32, type="Q8_0", tied=True)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 9).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory, device):
    opened = open_model(
        write_model(tmp_path_factory.mktemp("m") / "m.gguf", RECIPE), threads=2, device=device
    )
    yield opened
    opened.close()


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
def test_logits_are_those_of_the_reference(model, prompt):
    logits = feed(model, TOKENS, [9] if prompt else [2, 1, 1, 5], prompt)
    # The compiled table takes int8 activations for quantized weights.
    assert error(logits, Reference(model.path).logits(TOKENS)) < (2e-2 if model.ops.name == "cpu" else 1e-6)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
def test_how_tokens_are_fed_changes_no_bit(model, prompt):
    whole = feed(model, TOKENS, [9], prompt)
    np.testing.assert_array_equal(feed(model, TOKENS, [1, 5, 1, 2], prompt), whole)
    seqs = [new_sequence(model, TOKENS), new_sequence(model, TOKENS[::-1])]
    together = run(model, [part_of(seq, 0, 4, prompt) for seq in seqs])
    np.testing.assert_array_equal(together[0], whole[:4])
    mixed = [part_of(seqs[0], 4, 7, prompt), part_of(seqs[1], 4, 9, not prompt, want=1)]
    np.testing.assert_array_equal(run(model, mixed)[0], whole[4:7])


def test_what_was_rolled_back_or_stored_comes_again(model):
    seq = new_sequence(model, TOKENS)
    first = run(model, [part_of(seq, 0, 6, True)])[0]
    rest = run(model, [part_of(seq, 6, 9, False)])[0]
    stored = [cache.snapshot() for cache in seq.caches]
    for cache in seq.caches:
        cache.rollback(4)
    np.testing.assert_array_equal(run(model, [part_of(seq, 4, 6, True)])[0], first[4:])
    other = new_sequence(model, TOKENS)
    for cache, state in zip(other.caches, stored):
        cache.restore(state)
        cache.rollback(6)
    np.testing.assert_array_equal(run(model, [part_of(other, 6, 9, False)])[0], rest)


class Hooked:
    """A plan whose hooks keep what they are shown, and change what layers pass on."""

    def __init__(self, model):
        vars(self).update(
            vars(plain_plan(model)), on_attention=[self.queries], on_layer=[self.layer], recorded={}
        )
        self.model, self.seen = model, []

    def queries(self, seq, layer, q, cache):
        self.seen += [q.copy(), *cache.view()]

    def layer(self, step, layer, hidden):
        self.seen.append(hidden.copy())
        hidden[:, layer::2] *= 2
        self.seen.append(self.model.head(self, step, slice(7, 9)).copy())


def test_hooks_see_what_has_been_computed_and_may_change_it(model):
    """Whatever of a layer still runs when a hook is called has ended when the hook reads."""
    shown = []
    with closing(open_model(model.path, device="portable")) as portable:
        for opened in (model, portable):
            plan = Hooked(opened)
            logits = run(opened, [part_of(new_sequence(opened, TOKENS), 0, 9, True, want=2)], plan)[0]
            shown.append([*plan.seen, logits])
    for found, wanted in zip(*shown, strict=True):
        assert error(found, wanted) < (3e-2 if model.ops.name == "cpu" else 1e-5)


class Widened(LayerCache):
    """A cache that does its own arithmetic in Python: it stores twice the keys, and halves and negates."""

    def append(self, k, v, pos):
        super().append(2 * k, v, pos)

    def attend(self, q, q_pos, rule, out, prompt):
        super().attend(q / 2, q_pos, rule, out, prompt)
        np.negative(out, out=out)
        out *= -1


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "generated"])
def test_a_cache_that_computes_in_python_has_its_inputs_there(model, prompt):
    caches = [Widened(model.ops, *model.config.kv_shape(i), dtype=np.float32) for i in range(model.n_layers)]
    seq = Sequence(Request(tokens=TOKENS), TOKENS, caches)
    found = run(model, [part_of(seq, 0, 9, prompt)])[0]
    np.testing.assert_array_equal(found, feed(model, TOKENS, [9], prompt))


def test_streamed_weights_and_resident_ones_give_the_same(tmp_path, model):
    """Bytes that may be replaced are read anew for each product."""
    from cmr.weights import build_layer

    plan, copies = plain_plan(model), []

    class Streamed:
        def acquire(self, layer):
            copies.append({name: t.data.copy() for name, t in model.weights.tensors(layer).items()})
            placed = {
                name: (t, copies[-1][name].ctypes.data) for name, t in model.weights.tensors(layer).items()
            }
            return build_layer(model.ops, model.config, layer, placed)

        def release(self, layer):
            for data in copies.pop().values():
                data[:] = 0

    wanted = feed(model, TOKENS, [5, 4], True)
    object.__setattr__(plan, "weights", Streamed())
    seq = new_sequence(model, TOKENS)
    found = [run(model, [part_of(seq, *span, True)], plan)[0] for span in ((0, 5), (5, 9))]
    np.testing.assert_array_equal(np.concatenate(found), wanted)


PLUGINS = {
    "plain": [],
    "quantized keys": ["kv-quant:k=q8_0,v=q5_1"],
    "tiers": ["kv-tiers"],
    "eviction by weights": ["kv-evict"],
    "pages": ["attn-pages"],
    "drafts": ["spec-lookup"],
}


@pytest.mark.parametrize("plugins", PLUGINS.values(), ids=PLUGINS)
def test_sessions_say_what_numpy_says(model, plugins):
    texts = []
    with closing(open_model(model.path, device="portable")) as portable:
        for opened in (model, portable):
            with cmr.Session.open(opened, plugins) as session:
                request = session.request(TOKENS, max_tokens=4, temp=0.0, ignore_eos=True)
                texts.append(list(session.generate(request)))
    assert len(texts[0]) == 4 and (texts[0] == texts[1] or model.ops.name == "cpu")


def test_one_table_at_a_time_may_be_shared(model):
    other = open_ops(model.ops.name, 1)
    other.share(model.ops)
    buffer = other.buffer(2, 8)
    buffer.array[:] = 1
    other.scale_add(buffer, 2, buffer, 2.0)
    np.testing.assert_array_equal(buffer.array, 3)
    other.close()
