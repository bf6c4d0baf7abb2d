"""Recorded decoding steps: the same bits as the ordinary way, whatever changes between two steps."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from tests.feeding import new_sequence, part_of, run
from tests.models import RECIPES, VOCAB, Recipe, write_model

from cmr import AttnRule, PluginError, open_model
from cmr.model import plain_plan
from cmr.replay import KEPT

TOKENS = np.random.default_rng(3).integers(0, VOCAB, 700).astype(np.int32)
NAMES = ("llama", "gemma2", "olmo2", "granite", "mistral3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pair of the same model for each recipe: one that replays and one that never does."""
    folder, opened = tmp_path_factory.mktemp("replay"), {}

    def get(recipe):
        key = repr(recipe)
        if key not in opened:
            path = write_model(folder / f"{len(opened)}.gguf", recipe)
            pair = [open_model(path, threads=2) for _ in range(2)]
            pair[1].ops.replays = False
            opened[key] = pair
        return opened[key]

    yield get
    for model in sum(opened.values(), []):
        model.close()


def decode(model, plan, seq, start, stop):
    """Feed tokens one by one in the generated role: float32 [stop - start, n_vocab]."""
    return np.concatenate([run(model, [part_of(seq, i, i + 1, False)], plan)[0] for i in range(start, stop)])


def counting(model, monkeypatch):
    """Count the steps that ran from a program."""
    count, replay = [0], model.ops.replay

    def counted(program):
        count[0] += 1
        replay(program)

    monkeypatch.setattr(model.ops, "replay", counted)
    return count


@pytest.mark.parametrize("name", [name for name in NAMES if name in RECIPES])
def test_replayed_steps_give_the_same_bits(models, name, monkeypatch):
    pair = models(RECIPES[name])
    count = counting(pair[0], monkeypatch)
    rows = []
    for model in pair:
        plan, seq = plain_plan(model), new_sequence(model, TOKENS, np.float16)
        run(model, [part_of(seq, 0, 30, True)], plan)
        rows.append(decode(model, plan, seq, 30, 60))
    assert np.array_equal(*rows)
    assert count[0] > 0 or name == "granite"


WIDE = Recipe(layers=2, width=256, heads=4, dim=64, dim_v=64, inner=256)


def test_growth_pieces_and_rotation_tables_end_a_program(models, monkeypatch):
    pair = models(WIDE)
    count = counting(pair[0], monkeypatch)
    rows = []
    for model in pair:
        plan, seq = plain_plan(model), new_sequence(model, TOKENS, np.float16)
        rows.append(decode(model, plan, seq, 0, 600))
    assert np.array_equal(*rows)
    assert 400 < count[0] < 600


def test_sequences_and_prompts_may_take_turns(models):
    rows = []
    for model in models(WIDE):
        plan, out = plain_plan(model), []
        one, two = (new_sequence(model, TOKENS[k:], np.float16) for k in (0, 100))
        for turn in range(6):
            for seq, at in ((one, 10 * turn), (two, 10 * turn)):
                out += run(model, [part_of(seq, at, at + 4, True)], plan)
                out.append(decode(model, plan, seq, at + 4, at + 10))
        both = [part_of(one, 60, 61, False), part_of(two, 60, 62, False)]
        out += run(model, both, plan)
        for step in range(5):
            out += run(
                model,
                [
                    part_of(one, 61 + step, 62 + step, False),
                    part_of(two, 62 + 2 * step, 64 + 2 * step, False),
                ],
                plan,
            )
        for cache in one.caches:
            cache.rollback(20)
        out.append(decode(model, plan, one, 20, 30))
        rows.append(np.concatenate(out))
    assert np.array_equal(*rows)


def with_parts(model, **parts):
    """The plain plan with some of it replaced."""
    plan = plain_plan(model)
    for name, value in parts.items():
        object.__setattr__(plan, name, value)
    return plan


def test_hooks_see_the_same_in_steps_that_are_run_again(models, monkeypatch):
    pair, logs = models(WIDE), []
    count = counting(pair[0], monkeypatch)
    for model in pair:
        seen = []

        def on_attention(seq, layer, q, cache, seen=seen):
            seen.append((seq, layer, q.copy(), len(cache), cache.view()[0][-1].copy()))

        def on_layer(step, layer, hidden, seen=seen):
            seen.append((step.parts[0].seq, layer, hidden.copy()))

        plan = with_parts(model, on_attention=(on_attention,), on_layer=(on_layer,))
        seqs = [new_sequence(model, TOKENS[k:], np.float16) for k in (0, 100)]
        rows = [decode(model, plan, seqs[0], 0, 90)]
        for at in range(12):
            parts = [part_of(seqs[0], 90 + at, 91 + at, False), part_of(seqs[1], 2 * at, 2 * at + 2, False)]
            rows += run(model, parts, plan)
        seen = [(seqs.index(seq), *rest) for seq, *rest in seen]
        logs.append((seen, rows))
    assert len(logs[0][0]) == len(logs[1][0]) == 90 * 4 + 12 * 6
    for ours, theirs in zip(logs[0][0], logs[1][0]):
        assert all(map(np.array_equal, ours, theirs))
    assert all(map(np.array_equal, logs[0][1], logs[1][1]))
    assert count[0] > 70 * 3  # three stretches: before each call and behind the last


def test_layers_are_left_out_whenever_a_hook_says_so(models):
    rows, chosen = [], np.random.default_rng(0).integers(0, 4, 60) == 0
    for model in models(WIDE):

        def on_layer(step, layer, hidden):
            return layer == 0 and bool(chosen[step.pos[0]])

        leave = with_parts(model, on_layer=(on_layer,))
        always = with_parts(model, on_layer=(lambda step, layer, hidden: layer == 0,))
        for plan in (leave, always):
            seq = new_sequence(model, TOKENS, np.float16)
            for cache in seq.caches[1:]:
                cache.rollback(0)
            rows.append([run(model, [part_of(seq, i, i + 1, False)], plan)[0] for i in range(60)])
    assert np.array_equal(rows[0], rows[2]) and np.array_equal(rows[1], rows[3])
    assert not np.array_equal(rows[0], rows[1])


class Moving:
    """A source of weights whose records are others now and then, and which counts what is held."""

    def __init__(self, model, often):
        self.model, self.often, self.held, self.calls = model, often, [], 0

    def acquire(self, layer):
        self.calls += 1
        self.held.append(layer)
        record = self.model.weights.acquire(layer)
        return dataclasses.replace(record) if self.calls % self.often == 0 else record

    def release(self, layer):
        self.held.remove(layer)


@pytest.mark.parametrize("often", [1, 7, 1000])
def test_weights_from_elsewhere_are_asked_for_in_every_step(models, often, monkeypatch):
    pair, rows = models(WIDE), []
    count = counting(pair[0], monkeypatch)
    for model in pair:
        source = Moving(model, often)
        seq = new_sequence(model, TOKENS, np.float16)
        rows.append(decode(model, with_parts(model, weights=source), seq, 0, 60))
        assert source.calls == 2 * 60 and source.held == []
    assert np.array_equal(*rows)
    assert count[0] > {1: 0, 7: 20, 1000: 200}[often]


def test_weights_are_released_when_a_hook_fails(models):
    model = models(WIDE)[0]
    source, seq = Moving(model, 1000), new_sequence(model, TOKENS, np.float16)
    failing = []

    def on_attention(seq, layer, q, cache):
        if failing:
            raise ValueError("no")

    plan = with_parts(model, weights=source, on_attention=(on_attention,))
    decode(model, plan, seq, 0, 5)
    failing.append(True)
    for at in (5, 6):  # run again, then the ordinary way
        with pytest.raises(ValueError, match="no"):
            decode(model, plan, seq, at, at + 1)
        assert source.held == []
        plan.recorded.clear()


def own_attend(q, cache, q_pos, out, prompt):
    """Attend as the model does, by a call of its own."""
    cache.attend(q, q_pos, AttnRule(scale=0.25), out, prompt)


def test_attention_that_is_no_rule_is_called(models, monkeypatch):
    pair, rows = models(WIDE), []
    count = counting(pair[0], monkeypatch)
    for model in pair:
        attend = [model.rule(0).attend, own_attend]
        seq = new_sequence(model, TOKENS, np.float16)
        rows.append(decode(model, with_parts(model, attend=attend), seq, 0, 130))
    assert np.array_equal(*rows)
    assert count[0] > 2 * 110


def test_several_shapes_stay_recorded(models, monkeypatch):
    """Drafts of three depths and two sequences by turns: after two rounds all run from recordings."""
    pair, rows = models(WIDE), []
    count = counting(pair[0], monkeypatch)
    for model in pair:
        plan, out = plain_plan(model), []
        seqs = [new_sequence(model, TOKENS[k:], np.float16) for k in (0, 100)]
        for seq in seqs:  # room for all that follows
            for cache in seq.caches:
                cache.reserve(128)
        for turn in range(8):
            for size in (1, 2, 4):
                for seq in seqs:
                    out += run(
                        model, [part_of(seq, 7 * turn + size - 1, 7 * turn + 2 * size - 1, False)], plan
                    )
                parts = [part_of(seq, 7 * turn + 2 * size - 1, 7 * turn + 2 * size, False) for seq in seqs]
                out += run(model, parts, plan)
                for seq in seqs:
                    for cache in seq.caches:
                        cache.rollback(7 * turn + 2 * size - 1)
            for seq in seqs:
                for cache in seq.caches:
                    cache.rollback(7 * turn + 7)
        rows.append(np.concatenate(out))
        assert len(plan.recorded) <= KEPT
    assert np.array_equal(*rows)
    assert count[0] >= 8 * 9 - 2 * 9


def test_recordings_are_bounded_and_hold_no_keys_and_values(models):
    model = models(WIDE)[0]
    plan = plain_plan(model)
    seqs = [new_sequence(model, TOKENS[start:], np.float16) for start in range(KEPT + 3)]
    for seq in seqs:
        decode(model, plan, seq, 0, 4)
    assert len(plan.recorded) == KEPT
    refs = [weakref.ref(seq.caches[0]) for seq in seqs]
    del seq, seqs
    gc.collect()
    assert not any(ref() for ref in refs)


def test_a_cache_that_is_changed_before_its_turn_is_refused(models):
    model, changes = models(WIDE)[0], []
    seq = new_sequence(model, TOKENS, np.float16)
    plan = with_parts(
        model, on_layer=(lambda step, layer, hidden: [change() for change in changes] and None,)
    )
    decode(model, plan, seq, 0, 9)
    changes.append(lambda: seq.caches[1].keep([0, 1]))
    with pytest.raises(PluginError, match="the cache of layer 1 was changed before its turn .* in on_step"):
        decode(model, plan, seq, 9, 10)
