"""kv-tiers: the forms by age, their bytes, what they cost in divergence, and beside other plugins."""

import errno
import re
from pathlib import Path

import numpy as np
import pytest
from tests.beside import BESIDE, PROMPTS, alone, beside, tiny
from tests.toy import MODEL

from cmr import PluginError, Session, hookimpl
from cmr.eval import divergence_at_depth
from cmr.eval.following import written_text
from cmr.testing import check

STEEP = "kv-tiers:f16=64,q8=192"  # all three forms within a short text
DISK = f"{STEEP},disk=256"


def running(options, tokens, n):
    """A sequence of n tokens in a session with the plugin."""
    session = Session.open(tiny(), [options])
    seq = session.add(session.request(tokens, max_tokens=n - len(tokens) + 1, ignore_eos=True))
    while seq.stop is None:
        session.step()
        held = seq.caches
    return session, held


@pytest.fixture(scope="module")
def text():
    with Session.open(tiny(), []) as session:
        return written_text(session, 1000)


def test_tokens_have_the_form_of_their_age(text):
    _, caches = running(STEEP + ",sinks=3", text[:500], 600)
    for cache in caches:
        newest, bytes_, nibbles = cache.stores
        assert newest.k[0].dtype == np.float16 and {bytes_.k_type, nibbles.v_type} == {"Q8_0", "Q4_0"}
        assert newest.positions.tolist() == list(range(512, 600))
        assert bytes_.positions.tolist() == list(range(384, 512))
        assert nibbles.positions.tolist() == list(range(512))
        assert cache.pinned.positions.tolist() == [0, 1, 2]
        assert cache.positions.tolist() == list(range(600))


def test_memory_is_foretold_and_smaller(text):
    for options in ("kv-tiers:f16=64,q8=256", "kv-tiers:f16=64,q8=0", "kv-tiers:f16=64,q8=128,q4=512", DISK):
        session, caches = running(options, text[:1000], 1023)
        held, plain = sum(cache.nbytes for cache in caches), 1024 * (2 * 2 * 2 * 64 + 4) * tiny().n_layers
        assert session.plan.memory.kv == pytest.approx(held, rel=0.05)
        assert held < 0.7 * plain


def test_what_is_beyond_the_last_tier_is_evicted(text):
    _, caches = running("kv-tiers:f16=64,q8=128,q4=300,sinks=4", text[:800], 900)
    for cache in caches:
        assert cache.positions.tolist() == [0, 1, 2, 3, *range((899 - 300) // 64 * 64, 900)]


def test_it_costs_less_than_four_bits_for_all(text):
    for depth in (512, 900):
        tiers, all_of_it = (
            divergence_at_depth(tiny(), [options], text, depth, 48).divergence.mean
            for options in ("kv-tiers:f16=64,q8=256", "kv-quant:bits=4")
        )
        assert tiers < 0.6 * all_of_it, depth


@pytest.mark.parametrize("options", [STEEP, "kv-tiers:f16=64,q8=128,q4=192", DISK])
@pytest.mark.parametrize("other", BESIDE)
def test_beside_other_plugins_it_gives_what_it_gives_alone(options, other):
    if other == "prefix-cache":
        with pytest.raises(PluginError, match="prefix-cache cannot divide what .* \\(kv-tiers\\) keeps"):
            beside(other, [options])
    else:
        assert beside(other, [options], PROMPTS[1:]) == alone([options], PROMPTS[1:])


@pytest.mark.parametrize("others", [(), ("spec-lookup:gain=0",)], ids=["alone", "drafts"])
def test_recorded_steps_give_the_same_bits(others, text, monkeypatch):
    rows, model = [], tiny()
    text = text[:75] * 2
    for replays in (True, False):
        monkeypatch.setattr(model.ops, "replays", replays, raising=False)
        seen = []
        with Session.open(model, [STEEP, *others, Keeps(seen)]) as session:
            list(session.generate(session.request(text, max_tokens=150, ignore_eos=True, temp=0.0)))
        rows.append(np.concatenate(seen))
    np.testing.assert_array_equal(*rows)


class Keeps:
    """A plugin that keeps all logits."""

    exact = True

    def __init__(self, rows):
        self.rows = rows

    @hookimpl
    def on_logits(self, seq, draft, logits):
        self.rows.append(logits.copy())


def test_what_is_on_disk_is_as_good_as_in_memory(text, tmp_path):
    """Tokens are the same where a text is long enough that most of it lies on disk, also after preemption."""
    found = []
    for options in (STEEP, f"{DISK},dir={tmp_path}", f"{STEEP},disk=192,dir={tmp_path}"):
        session = Session.open(tiny(), [options], chunk=100)
        seq = session.add(session.request(text[:600], max_tokens=200, ignore_eos=True, temp=1.0, seed=4))
        while seq.stop is None:
            session.step()
            held = seq.caches
            if seq.n_new == 100 and not seq.notes.get("freed"):
                seq.notes["freed"] = True
                seq.rollback(0)
        assert seq.error is None
        found.append((seq.new, sum(cache.nbytes for cache in held)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[1][1] < 0.75 * found[0][1] and found[2][1] < found[1][1]
    assert list(tmp_path.iterdir()) == []


def test_the_process_holds_less_by_what_is_on_disk(text):
    _, caches = running(f"{STEEP},disk=192", text[:1000], 1023)
    for cache in caches:
        store = cache.stores[-1]
        filed = [*store.k, *store.v]
        assert sum(map(resident, filed)) < 0.1 * sum(array[:, : len(store)].nbytes for array in filed)


def resident(array):
    """The bytes of an array's file in memory, spare pages at the ends of heads left out."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match("[0-9a-f]+-[0-9a-f]+ ", line)]
    for i in starts:
        low, high = (int(part, 16) for part in lines[i].split(" ", 1)[0].split("-"))
        if low <= array.ctypes.data < high:
            return 1024 * next(int(line.split()[1]) for line in lines[i:] if line.startswith("Rss:"))
    raise AssertionError("it lies nowhere")


@pytest.mark.parametrize("broken", ["full", "limit"])
def test_a_full_disk_is_told_of_once_and_nothing_is_lost(text, broken, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if broken == "full":
        monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    options = DISK + (",most=100kB" if broken == "limit" else "")
    with Session.open(tiny(), [options]) as session:
        found = list(session.generate(session.request(text[:600], max_tokens=60, temp=0.0, ignore_eos=True)))
    said = capsys.readouterr().err
    assert (
        said.startswith("kv-tiers: ")
        and said.endswith("; older tokens stay in memory\n")
        and said.count("\n") == 1
    )
    assert ("No space left" if broken == "full" else "limit of 100000") in said
    with Session.open(tiny(), [STEEP]) as session:
        request = session.request(text[:600], max_tokens=60, temp=0.0, ignore_eos=True)
        assert found == list(session.generate(request))


def test_nothing_of_the_disk_costs_where_it_is_not_used():
    with Session.open(tiny(), [STEEP]) as session:
        assert session.plan.on_attention == ()
    with Session.open(tiny(), [DISK]) as session:
        assert session.plan.names["on_attention"] == ("kv-tiers",)


def test_contracts():
    for options in ("kv-tiers", DISK):
        assert [finding for finding in check(options, tiny()) if not finding.holds] == []


@pytest.mark.parametrize("options", ["disk=1000", "q4=2000,disk=2000", "q8=0,disk=2000"])
def test_what_is_not_in_4_bits_cannot_lie_on_disk(options):
    with pytest.raises(PluginError, match="lies between q8=.* and q4=.*, where 4-bit tokens are"):
        Session.open(tiny(), [f"kv-tiers:{options}"])


@pytest.mark.parametrize("options", ["f16=0", "f16=100,q8=100", "q8=500,q4=400", "sinks=-1"])
def test_tiers_that_are_in_no_order_are_refused(options):
    with pytest.raises(PluginError, match="further back"):
        Session.open(tiny(), [f"kv-tiers:{options}"])


def test_heads_that_do_not_fit_are_named():
    with pytest.raises(PluginError, match="blocks of 32"):
        Session.open(MODEL, ["kv-tiers"])
