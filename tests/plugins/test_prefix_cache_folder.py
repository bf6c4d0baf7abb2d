"""prefix-cache's folder: later runs, damage, full and read-only disks, limits, processes at once."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from tests.toy import MODEL, PROMPT, PROMPTS, run

from cmr import PluginError, Session
from cmr.testing import check
from cmr_plugins.prefix_cache import folder as folders

LONG = PROMPTS[-1]
ALIKE = (PROMPT, LONG, PROMPT + LONG, LONG[:70] + PROMPT)
PLAIN = {prompt: run(prompt=prompt, max_tokens=4) for prompt in ALIKE}


def session_of(path, block=8, **options):
    """A new session whose prefixes are in a folder, and whose memory is empty."""
    words = "".join(f",{key}={value}" for key, value in options.items())
    return Session.open(MODEL, [f"prefix-cache:dir={path},block={block}{words}"])


def cached(session, prompt=PROMPT):
    """How a prompt was reused; its answer must be the plain one."""
    text = session.text(prompt, max_tokens=4, temp=0.0)
    "".join(text)
    assert text.seq.new == PLAIN[prompt]
    return text.seq.notes["prefix-cache"]


def report(session):
    return session.report()["prefix-cache"]


def size_of(path):
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def test_later_sessions_use_what_earlier_ones_stored(tmp_path):
    path = tmp_path / "a" / "b"
    assert cached(session_of(path)) == "0 of 52 reused: empty"
    for memory in ("1G", "0"):
        session = session_of(path, memory=memory)
        assert cached(session) == "51 of 52 reused" and cached(session) == "51 of 52 reused"
        assert cached(session, PROMPT + LONG).startswith("52 of 190" if memory == "1G" else "189 of 190")
    assert report(session)["disk_bytes"] == size_of(path) and report(session)["memory_bytes"] == 0


def test_a_shorter_last_block_gives_way_to_the_longer_one(tmp_path):
    cached(session_of(tmp_path, block=64), PROMPT)
    cached(session_of(tmp_path, block=64), PROMPT + LONG)
    session = session_of(tmp_path, block=64)
    assert cached(session, PROMPT + LONG) == "189 of 190 reused" and cached(session) == "51 of 52 reused"
    assert report(session)["blocks"] == 3


@pytest.mark.parametrize("seed", range(25))
def test_damaged_files_are_noticed_removed_and_written_again(tmp_path, seed):
    rng = random.Random(seed)
    first = session_of(tmp_path)
    for prompt in ALIKE:
        cached(first, prompt)
    opened = session_of(tmp_path) if seed % 2 else None
    if opened:
        cached(opened, LONG)
    files = sorted(tmp_path.glob("*/*.kv"))
    for file in rng.sample(files, rng.randint(1, len(files))):
        damage(file, rng)
    session = opened or session_of(tmp_path)
    told = [cached(session, prompt) for prompt in ALIKE]
    reasons = ("corrupted", "evicted", "gone", "nothing stored", "first difference", "empty")
    assert opened or any(reason in said for said in told for reason in reasons)
    whole = [f"{len(prompt) - 1} of {len(prompt)} reused" for prompt in ALIKE]
    for _ in files:  # each use mends at least the first block that it finds damaged
        again = session_of(tmp_path, memory=0)
        if [cached(again, prompt) for prompt in ALIKE] == whole:
            return
    raise AssertionError("damage stays")


def damage(file, rng):
    """Spoil a file in one of the ways that disks and people have."""
    data = bytearray(file.read_bytes())
    way = rng.randrange(6)
    if way == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del data[rng.randrange(len(data)) :]
    elif way == 2:
        data += b"x"
    elif way == 3:
        data[:] = rng.randbytes(rng.randrange(3000))
    elif way == 4:
        start = rng.randrange(len(data))
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    file.unlink()
    if way < 5:
        file.write_bytes(data)


def test_every_byte_of_a_file_counts(tmp_path):
    cached(session_of(tmp_path, block=64))
    (file,) = tmp_path.glob("*/*.kv")
    sound = file.read_bytes()
    for place in [*range(0, 300, 7), *range(300, len(sound), 997), len(sound) - 1]:
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        assert cached(session_of(tmp_path, block=64)).startswith("0 of 52 reused: corrupted at token 0")
        assert file.read_bytes() == sound


def test_a_sound_file_of_other_tokens_is_not_taken(tmp_path):
    session = session_of(tmp_path, block=64)
    for prompt in (PROMPT, LONG):
        cached(session, prompt)
    names = sorted(tmp_path.glob("*/*.kv"))
    for file in names[1:]:
        shutil.copy(names[0], file)
    session = session_of(tmp_path, block=64)
    assert sum("corrupted" in cached(session, prompt) for prompt in (PROMPT, LONG)) >= 1


# -- disks that do not take it --


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_refuses_costs_only_the_storing(tmp_path, monkeypatch, number, after):
    put, done = folders.Folder._put, []

    def refuse(self, file, draft, *parts):
        done.append(file)
        if len(done) > after:
            draft.write_bytes(parts[0][:20])
            raise OSError(number, os.strerror(number))
        put(self, file, draft, *parts)

    monkeypatch.setattr(folders.Folder, "_put", refuse)
    session = session_of(tmp_path)
    assert [cached(session), cached(session)] == ["0 of 52 reused: empty", "51 of 52 reused"]
    figures = report(session)
    assert figures["trouble"] == os.strerror(number) and figures["unwritten"] >= 1
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    later = session_of(tmp_path)
    stored = 8 * max(0, after - 1)  # the first file is that of the key
    why = "nothing stored further at token 16" if after else "empty"
    assert cached(later) == f"{stored} of 52 reused: {why}"


def test_what_the_system_refuses_is_met_too(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a block takes 1600 bytes
    try:
        session = session_of(tmp_path)
        assert [cached(session), cached(session)] == ["0 of 52 reused: empty", "51 of 52 reused"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert report(session)["trouble"] == os.strerror(errno.EFBIG)
    assert [file.name for file in tmp_path.rglob("*.*")] == ["key.json"]


def test_a_folder_that_goes_away_or_cannot_be_made(tmp_path):
    session = session_of(tmp_path / "x", memory=0)
    cached(session)
    shutil.rmtree(tmp_path / "x")
    assert cached(session) == "0 of 52 reused: evicted at token 0"
    assert report(session)["unwritten"] > 0
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError, match="prefix-cache: the folder .*file/x cannot be made"):
        session_of(tmp_path / "file" / "x")


@pytest.mark.parametrize("limit", [0, 3000, 12000, 40000, 10**6])
@pytest.mark.parametrize("memory", ["0", "1G"])
def test_the_limit_of_files_holds(tmp_path, limit, memory):
    session = session_of(tmp_path, disk=limit, memory=memory)
    rng = random.Random(limit)
    for _ in range(16):
        cached(session, rng.choice(ALIKE))
        assert size_of(tmp_path) <= limit
    if limit == 10**6:
        assert report(session)["hits"] >= 12


def test_the_limit_counts_all_keys_and_the_least_used_go_first(tmp_path):
    cached(session_of(tmp_path, block=16), LONG)
    cached(session_of(tmp_path, block=8), PROMPT)
    before = {file.parent.name for file in tmp_path.glob("*/*.kv")}
    assert len(before) == 2
    session = session_of(tmp_path, block=8, disk=size_of(tmp_path) + 1000)
    cached(session, PROMPT + LONG)
    assert len({file.parent.name for file in tmp_path.glob("*/*.kv")}) <= 2
    assert cached(session_of(tmp_path, block=8), PROMPT) == "51 of 52 reused"


def test_half_written_files_of_dead_processes_are_removed_in_time(tmp_path):
    cached(session_of(tmp_path))
    (key,) = (path for path in tmp_path.iterdir() if path.is_dir())
    old, new = key / "a.1.tmp", key / "b.2.tmp"
    for file in (old, new):
        file.write_bytes(bytes(5000))
    os.utime(old, (time.time() - 3600,) * 2)
    cached(session_of(tmp_path, disk=size_of(tmp_path)), LONG)
    assert not old.exists() and new.exists()


# -- processes --


def work(path, seed, rounds, failures):
    """Ask for prompts in random order under tight limits; report answers that are not the plain ones."""
    rng = random.Random(seed)
    try:
        for _ in range(rounds):
            session = session_of(path, memory=rng.choice(["0", "20K", "1G"]), disk=60000)
            for _ in range(6):
                cached(session, rng.choice(ALIKE))
    except BaseException as error:
        failures.put(f"{type(error).__name__}: {error}")
        raise


@pytest.mark.slow
def test_processes_at_once_give_plain_tokens_and_see_each_others_files(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, seed, 6, failures)) for seed in range(4)]
    for worker in workers:
        worker.start()
    time.sleep(1)
    workers[0].kill()  # in the middle of whatever it does
    for worker in workers:
        worker.join(300)
    assert failures.empty() and [worker.exitcode for worker in workers[1:]] == [0, 0, 0]
    assert size_of(tmp_path) <= 60000 + 3 * 6000
    session = session_of(tmp_path)
    assert any(not cached(session, prompt).startswith("0 ") for prompt in ALIKE)


def test_a_running_session_sees_what_another_stores_and_removes(tmp_path):
    one, other = session_of(tmp_path), session_of(tmp_path, memory=0)
    assert cached(one) == "0 of 52 reused: empty"
    assert cached(other) == "51 of 52 reused"
    for file in tmp_path.glob("*/*.kv"):
        file.unlink()
    assert cached(other) == "0 of 52 reused: evicted at token 0"
    assert cached(one) == "51 of 52 reused"


def test_the_contracts_hold(tmp_path):
    assert [finding for finding in check(f"prefix-cache:dir={tmp_path},memory=4K") if not finding.holds] == []
