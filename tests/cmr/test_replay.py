"""Recorded decoding steps: the same bits as the ordinary way, whatever changes between two steps."""

import numpy as np
import pytest
from tests.feeding import new_sequence, part_of, run
from tests.models import RECIPES, VOCAB, Recipe, write_model

from cmr import open_model
from cmr.model import plain_plan

TOKENS = np.random.default_rng(3).integers(0, VOCAB, 700).astype(np.int32)
NAMES = ("llama", "gemma2", "olmo2", "granite")


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


def test_a_hook_in_the_layers_is_always_called(models):
    model = models(WIDE)[0]
    plan, seq, seen = plain_plan(model), new_sequence(model, TOKENS, np.float16), []
    object.__setattr__(plan, "on_layer", (lambda step, index, hidden: seen.append(index) or False,))
    decode(model, plan, seq, 0, 6)
    assert seen == [0, 1] * 6
