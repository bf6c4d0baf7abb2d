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
NAMES = ("llama", "gemma2", "olmo2", "granite", "mistral3", "qwen3next")


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


def recordings(model, monkeypatch):
    """Count the steps that are recorded."""
    count, recording = [0], model.ops.recording

    def counted():
        count[0] += 1
        return recording()

    monkeypatch.setattr(model.ops, "recording", counted)
    return count


# -- the same bits, whosever the caches are --


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


def test_recordings_grow_with_their_caches(models, monkeypatch):
    """Over growth by half, a second piece of 512 slots and more threads, which alone are worth recording anew."""
    pair = models(WIDE)
    count, made = counting(pair[0], monkeypatch), recordings(pair[0], monkeypatch)
    rows = []
    for model in pair:
        plan, seq = plain_plan(model), new_sequence(model, TOKENS, np.float16)
        rows.append(decode(model, plan, seq, 0, 600))
    assert np.array_equal(*rows)
    assert count[0] >= 600 - made[0] and made[0] <= 2


RULES = (AttnRule(), AttnRule(window=40, sinks=3), AttnRule(window=7))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_recording_serves_all_sequences_wherever_their_caches_lie(models, rule, monkeypatch):
    """One grows while the other waits, one is begun anew in the place of the other: no step reads an old place."""
    pair, rows = models(WIDE), []
    made = recordings(pair[0], monkeypatch)
    for model in pair:
        plan, out = with_parts(model, attend=[rule.attend] * 2), []
        one, two = (new_sequence(model, TOKENS[k:], np.float16) for k in (0, 100))
        for seq in (one, two):
            run(model, [part_of(seq, 0, 200, True)], plan)
        out.append(decode(model, plan, one, 200, 203))
        before = made[0]
        for turn in range(4):
            at = 203 + 60 * turn
            out.append(decode(model, plan, one, at, at + 60))
            out.append(decode(model, plan, two, 200 + 3 * turn, 203 + 3 * turn))
        for start in (1, 2):
            two.caches = new_sequence(model, [1], np.float16).caches
            gc.collect()
            run(model, [part_of(two, 0, 190 + start, True)], plan)
            out.append(decode(model, plan, two, 190 + start, 200))
            out.append(decode(model, plan, one, 443 + 2 * start, 445 + 2 * start))
        if model is pair[0]:
            assert made[0] == before
        rows.append(np.concatenate(out))
    assert np.array_equal(*rows)


def test_batches_change_their_members_without_being_recorded_anew(models, monkeypatch):
    pair, rows = models(WIDE), []
    count, made = counting(pair[0], monkeypatch), recordings(pair[0], monkeypatch)
    for model in pair:
        plan, out, at = plain_plan(model), [], {}
        seqs = [new_sequence(model, TOKENS[k:], np.float16) for k in range(6)]
        for place, seq in enumerate(seqs):
            at[seq] = 130 + 10 * place
            run(model, [part_of(seq, 0, at[seq], True)], plan)
        rng = np.random.default_rng(0)
        for _ in range(60):
            chosen = rng.permutation(6)[:3]
            out += run(model, [part_of(seqs[k], at[seqs[k]], at[seqs[k]] + 1, False) for k in chosen], plan)
            for k in chosen:
                at[seqs[k]] += 1
        rows.append(np.concatenate(out))
    assert np.array_equal(*rows)
    assert made[0] <= 2 and count[0] >= 58


def test_a_cache_that_can_be_replayed_again_is_no_longer_called(models, monkeypatch):
    pair, rows = models(WIDE), []
    count = counting(pair[0], monkeypatch)
    for model in pair:
        plan, torn, whole = plain_plan(model), *(new_sequence(model, TOKENS, np.float16) for _ in range(2))
        out = [decode(model, plan, torn, 0, 9)]
        torn.caches[1].keep_heads([range(5)] + [range(9)] * (torn.caches[1].kv_heads - 1))
        before = count[0]
        out.append(decode(model, plan, torn, 9, 19))
        assert model is pair[1] or count[0] == before + 2 * 9  # one step is recorded, others call once
        before = count[0]
        out.append(decode(model, plan, whole, 0, 10))
        assert model is pair[1] or count[0] == before + 9
        rows.append(np.concatenate(out))
    assert np.array_equal(*rows)


class Life:
    """Sequences whose caches go through all that may happen to a cache, the same for each model."""

    def __init__(self, model, seed):
        self.model, self.plan, self.rng = model, plain_plan(model), np.random.default_rng(seed)
        self.seqs = [new_sequence(model, TOKENS[9 * k :], np.float16) for k in range(3)]
        self.at, self.rows = [0, 0, 0], []

    def feed(self, chosen):
        """Feed one or two generated tokens of some sequences in one step."""
        parts = []
        for k in chosen:
            stop = self.at[k] + int(self.rng.integers(1, 3))
            parts.append(part_of(self.seqs[k], self.at[k], stop, False))
            self.at[k] = stop
        self.rows += run(self.model, parts, self.plan)

    def rollback(self, k, seq):
        self.at[k] = int(self.rng.integers(self.at[k] + 1))
        for cache in seq.caches:
            cache.rollback(self.at[k])

    def evict(self, k, seq):
        for cache in seq.caches:
            if not cache.ragged:
                cache.keep(np.flatnonzero(self.rng.random(len(cache)) < 0.4))

    def tear(self, k, seq):
        for cache in seq.caches[1:]:
            ends = [int(self.rng.integers(len(cache.head_positions(h)) + 1)) for h in range(cache.kv_heads)]
            cache.keep_heads([range(end) for end in ends])

    def same_kind(self, k):
        return self.seqs[k].caches[0].dtype == self.seqs[k - 1].caches[0].dtype

    def move(self, k, seq):
        if self.same_kind(k):
            for ours, theirs in zip(seq.caches, self.seqs[k - 1].caches):
                theirs.restore(ours.snapshot())
            self.at[k - 1] = self.at[k]

    def renew(self, k, seq):
        kind = (np.float16, np.float16, np.float32)[int(self.rng.integers(3))]
        seq.caches, self.at[k] = new_sequence(self.model, [1], kind).caches, 0

    def swap(self, k, seq):
        other = self.seqs[k - 1]
        seq.caches, other.caches = other.caches, seq.caches
        self.at[k], self.at[k - 1] = self.at[k - 1], self.at[k]

    def live(self, steps):
        """Feed, and in one step of seven let something happen; float32 [rows, n_vocab]."""
        events = (self.rollback, self.evict, self.tear, self.move, self.renew, self.swap)
        for _ in range(steps):
            self.feed(self.rng.permutation(3)[: int(self.rng.integers(1, 4))])
            if self.rng.random() < 0.15:
                k = int(self.rng.integers(3))
                events[int(self.rng.integers(len(events)))](k, self.seqs[k])
        return np.concatenate(self.rows)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_becomes_of_caches_no_step_is_run_on_what_they_were(models, seed, monkeypatch):
    pair = models(WIDE)
    count = counting(pair[0], monkeypatch)
    ours, theirs = (Life(model, seed).live(160) for model in pair)
    assert np.array_equal(ours, theirs)
    assert count[0] > 40


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


# -- hooks, weights and attention that are called --


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


# -- what is kept, and what is refused --


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
    seqs = [new_sequence(model, TOKENS[start:], np.float16) for start in range(3)]
    for seq in seqs:
        for size in range(1, KEPT + 3):
            run(model, [part_of(seq, size, 2 * size, False)], plan)
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
