"""What a recurrent layer keeps of a sequence: what can be done with it, and what of a cache it has no room for."""

import numpy as np
import pytest

from cmr.deltanet import DeltaNet
from cmr.ops import open_ops
from cmr.ops.records import DeltaWeights
from cmr.state import DeltaState

SIZES = DeltaNet(1, 2, 16, 16, 3)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def ops(device):
    table = open_ops(device, threads=2)
    if "delta_net" not in table.features:
        pytest.skip(f"{device} computes no delta nets")
    yield table
    table.close()


@pytest.fixture(scope="module")
def weights(ops):
    ones = np.ones(SIZES.dim_v, np.float32)
    taps = RNG.standard_normal((SIZES.window, SIZES.channels)).astype(np.float32)
    keeps = np.float32([-0.5, -0.1])
    return DeltaWeights(SIZES, taps, keeps, keeps.copy(), ops.norm_of(ones, None, 1e-5, "rms"))


def fed(ops, weights, state, start, stop):
    """What rows start to stop of one text read from a state."""
    x, out = ops.buffer(30, SIZES.inputs), ops.buffer(30, SIZES.values)
    x.array[:] = np.random.default_rng(1).standard_normal(x.array.shape)
    state.take(x, slice(start, stop), False, weights, out)
    return out.array[start:stop].copy()


def test_memory_is_there_with_the_first_row_and_never_more(ops, weights):
    state = DeltaState(ops, SIZES)
    assert state.nbytes == len(state) == state.token_bytes == 0
    for stop in (1, 30):
        fed(ops, weights, state, len(state), stop)
        assert len(state) == state.used == stop
        held = sum(array.nbytes for array in state.snapshot().values())
        assert state.nbytes == state.bytes_at(1) == state.bytes_at(10**6) == SIZES.state_bytes == held


def test_it_goes_back_to_the_beginning_alone(ops, weights):
    state = DeltaState(ops, SIZES)
    whole = fed(ops, weights, state, 0, 12)
    assert not state.can_rollback
    assert [state.can_rollback_to(pos) for pos in (0, 1, 11, 12, 13)] == [True, False, False, True, True]
    with pytest.raises(ValueError, match="cannot go back from 12 rows to 5"):
        state.rollback(5)
    state.rollback(12)
    assert len(state) == 12
    state.rollback(0)
    assert state.nbytes == len(state) == 0
    np.testing.assert_array_equal(fed(ops, weights, state, 0, 12), whole)


def test_a_snapshot_goes_on_as_the_state_did(ops, weights):
    state, other = DeltaState(ops, SIZES), DeltaState(ops, SIZES)
    fed(ops, weights, state, 0, 7)
    copy = state.snapshot()
    wanted = fed(ops, weights, state, 7, 20)
    other.restore(copy)
    assert len(other) == 7
    np.testing.assert_array_equal(fed(ops, weights, other, 7, 20), wanted)
    state.restore(copy)
    np.testing.assert_array_equal(fed(ops, weights, state, 7, 20), wanted)


def test_new_arrays_have_another_generation(ops, weights):
    state = DeltaState(ops, SIZES)
    seen = {state.generation}
    fed(ops, weights, state, 0, 1)
    seen.add(state.generation)
    kept = state.generation
    fed(ops, weights, state, 1, 9)
    state.restore(state.snapshot())
    assert state.generation == kept
    state.clear()
    seen.add(state.generation)
    assert len(seen) == 3
