"""Arrays on disk: their room, its limit, what is left, and that what leaves memory is still there."""

import errno
import gc
import re
from pathlib import Path

import numpy as np
import pytest

from cmr import DiskError, DiskSpace
from cmr.diskspace import expect, leave, map_of

LINUX = Path("/proc/self/smaps").exists()


def resident(array):
    """The bytes of an array's file that are in this process's memory."""
    address, total, inside = array.ctypes.data, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_arrays_are_zero_and_have_no_names(tmp_path):
    space = DiskSpace(tmp_path / "new")
    a, b = space.zeros((2, 3000, 36), np.uint8), space.zeros((2, 100, 64), np.float16)
    assert not a.any() and b.dtype == np.float16 and space.used == a.nbytes + b.nbytes
    a[1, 5] = 7
    assert a.sum() == 7 * 36 and not b.any()
    assert list((tmp_path / "new").iterdir()) == []
    assert space.zeros((2, 0, 36), np.uint8).size == 0


def test_room_is_given_back_with_the_array(tmp_path):
    space = DiskSpace(tmp_path, 10_000)
    a = space.zeros((1, 8000), np.uint8)
    with pytest.raises(DiskError, match="4000 bytes more than 8000 on disk are over the limit of 10000"):
        space.zeros((1, 4000), np.uint8)
    part = a[:, :10]
    del a
    gc.collect()
    assert space.used == 8000  # a part of it is still in use
    del part
    gc.collect()
    assert space.used == 0
    assert space.zeros((1, 4000), np.uint8).nbytes == 4000


@pytest.mark.skipif(not LINUX, reason="needs /proc")
def test_what_leaves_memory_is_still_there(tmp_path):
    a = DiskSpace(tmp_path).zeros((4, 20_000, 36), np.uint8)
    a[...] = np.random.default_rng(0).integers(0, 256, a.shape, np.uint8)
    before, copy = resident(a), a.copy()
    leave(a, 10_000)
    assert before >= a.nbytes and 0.4 * before < resident(a) < 0.6 * before
    leave(a, 20_000)
    assert resident(a) < 0.02 * before
    expect(a, 20_000)
    np.testing.assert_array_equal(a, copy)


def test_arrays_in_memory_take_no_advice():
    a = np.ones((2, 5000, 8))
    leave(a, 5000)
    expect(a, 5000)
    assert map_of(a[0, 3:]) is None and a.all()


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(DiskError, match=r"^.* takes no file of 500 bytes: No space left on device$"):
        DiskSpace(tmp_path).zeros((1, 500), np.uint8)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="takes no file of 500 bytes: File exists|Not a directory"):
        DiskSpace(tmp_path / "file").zeros((1, 500), np.uint8)


def test_only_the_first_failure_is_told_of():
    told = []
    space = DiskSpace(None, 0, told.append)
    for size in (5, 6):
        try:
            space.zeros((1, size), np.uint8)
        except DiskError as error:
            space.complain(error)
    assert told == [space.trouble] == ["5 bytes more than 0 on disk are over the limit of 0"]
    with pytest.raises(DiskError):
        DiskSpace().complain(DiskError("nobody to tell"))


def test_where_room_cannot_be_reserved_it_is_written(tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    a = DiskSpace(tmp_path).zeros((3, 1 << 19), np.uint8)
    a[2, -1] = 1
    assert a.sum() == 1
