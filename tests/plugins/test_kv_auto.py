"""kv-auto: it takes what an independent computation takes, remembers it, and says what it cannot do."""

import json

import pytest
from tests.beside import BESIDE, PROMPTS, STORY, alone, beside, tiny
from tests.toy import MODEL

import cmr
from cmr.eval import divergence_at_depth
from cmr.plan import explain
from cmr.testing import check
from cmr_plugins import kv_auto
from cmr_plugins.kv_auto import KvAuto
from cmr_plugins.kv_auto.table import Row, cheapest

SETTINGS = ("kv-quant:bits=8", "kv-quant:k=q8_0,v=q4_0", "kv-quant:bits=4")
TOKENS, DEPTHS = 160, (64, 95)
ONE = ",settings=[kv-quant:bits=4],tokens=129"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text(STORY * 2)
    return path


@pytest.fixture(scope="module")
def measured(text):
    """What the settings cost by the function that runs both sessions side by side: KL at both depths, bytes."""
    tokens = tiny().tokenizer.encode(text.read_text(), bos=True)
    found = {
        name: [divergence_at_depth(tiny(), [name], tokens, depth) for depth in DEPTHS] for name in SETTINGS
    }
    return {
        name: (max(cost.divergence.mean for cost in costs), costs[-1].kv_bytes)
        for name, costs in found.items()
    }


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """A folder that remembers the figures of SETTINGS."""
    path = tmp_path_factory.mktemp("remembered")
    session = cmr.Session.open(tiny(), [auto(text, path)])
    assert session.report()["kv-auto"]["measured"] == len(SETTINGS)
    return path


def auto(text, folder, kl=1e-9, **options):
    return KvAuto(text=text, dir=folder, kl=kl, **({"settings": SETTINGS, "tokens": TOKENS} | options))


def opened(plugin):
    """A session with the plugin and what it reports."""
    session = cmr.Session.open(tiny(), [plugin])
    return session, session.report()["kv-auto"]


@pytest.fixture
def still(monkeypatch):
    """Nothing may be measured."""

    def never(*arguments):
        pytest.fail("something was measured")

    monkeypatch.setattr(kv_auto, "DepthProbe", never)


def test_it_takes_what_an_independent_computation_takes(text, folder, measured, still):
    levels = sorted(kl for kl, _ in measured.values())
    chosen = set()
    for bound in [(a + b) / 2 for a, b in zip([0, *levels], [*levels, 2 * levels[-1]])]:
        under = {name: held for name, (kl, held) in measured.items() if kl < bound}
        _, report = opened(auto(text, folder, bound))
        assert report["chosen"] == (min(under, key=under.get) if under else "f16")
        if under:
            kl, held = measured[report["chosen"]]
            assert report["kl"] == kl
            assert report["share_of_f16"] == pytest.approx(held / (2 * 2 * 64 * 2 * 6 + 24), rel=0.01)
        chosen.add(report["chosen"])
    assert chosen == {*SETTINGS, "f16"}


def test_the_choice_runs_as_it_does_alone(text, folder):
    for bound, name in ((1e9, "kv-quant:bits=4"), (measured_between(text, folder), "kv-quant:bits=8")):
        plugin = auto(text, folder, bound)
        assert alone([plugin]) == alone([name])
        assert plugin.settled == (name,)
    assert alone([auto(text, folder, 1e9)]) != alone([])


def measured_between(text, folder):
    """A bound that only the setting of most bits lies under."""
    rows = opened(auto(text, folder))[0].plan.plugins["kv-auto"].rows
    return (rows["kv-quant:bits=8"].worst + rows["kv-quant:k=q8_0,v=q4_0"].worst) / 2


def test_where_nothing_lies_under_the_bound_f16_stays_and_it_says_so(text, folder, capsys):
    session, report = opened(auto(text, folder))
    assert report["chosen"] == "f16" and report["share_of_f16"] == 1
    assert set(session.plan.owners["kv_cache"]) == {"built in"}
    assert (
        "no setting smaller than f16 lies under a KL of 1e-09, as remembered; f16 stays"
        in capsys.readouterr().err
    )
    assert alone([auto(text, folder)]) == alone([])


def test_the_table_is_printed_and_the_plan_explains_the_choice(text, tmp_path, capsys):
    session, report = opened(auto(text, tmp_path, 1.0))
    lines = capsys.readouterr().err.splitlines()
    assert "measuring 3 settings on 160 tokens of" in lines[0]
    assert lines[1].split()[1:8] == ["setting", "KL", "at", "64", "KL", "at", "95"]
    assert [line.split()[1] for line in lines[2:6]] == ["f16", *reversed(SETTINGS)]
    rows = session.plan.plugins["kv-auto"].rows
    for line in lines[3:6]:
        _, name, *figures = line.split()
        assert [float(kl) for kl in figures[:2]] == pytest.approx(rows[name].kl, abs=1e-5)
        assert float(figures[2]) == pytest.approx(rows[name].kv_bytes, abs=1)
    assert lines[6].startswith("kv-auto: kv-quant:bits=4, the smallest under a KL of 1:") and len(lines) == 7
    assert any(line.split() == ["settled:", "kv-quant:bits=4"] for line in explain(session.plan))


def test_another_text_model_or_length_is_measured(text, folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("The end. " + STORY * 2)
    assert opened(auto(other, folder))[1]["measured"] == 3
    assert opened(auto(text, folder, tokens=150))[1]["measured"] == 3
    session = cmr.Session.open(tiny(512), [auto(text, folder)])
    assert session.report()["kv-auto"]["measured"] == 3
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text() + "more than is measured")
    assert opened(auto(copy, folder))[1]["measured"] == 0


def test_only_new_settings_are_measured(text, tmp_path):
    assert opened(auto(text, tmp_path, settings=SETTINGS[:2]))[1]["measured"] == 2
    assert opened(auto(text, tmp_path))[1]["measured"] == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "other", "empty"])
def test_a_damaged_memory_is_measured_again_and_said_once(damage, text, tmp_path, capsys):
    open_one = lambda: opened(f"kv-auto:text={text},dir={tmp_path}{ONE}")  # noqa: E731
    _, before = open_one()
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    found = json.loads(whole)
    next(iter(found["rows"].values()))["kv_bytes"] += 1
    path.write_text({"cut": whole[:-9], "changed": json.dumps(found), "other": "[1, 2]", "empty": ""}[damage])
    capsys.readouterr()
    _, after = open_one()
    assert after["measured"] == 1 and after["chosen"] == before["chosen"]
    assert capsys.readouterr().err.count("is damaged; measuring again") == 1
    assert open_one()[1]["measured"] == 0 and "damaged" not in capsys.readouterr().err
    assert [path] == list(tmp_path.iterdir())


def test_without_a_place_to_remember_it_works_and_says_so(text, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    _, report = opened(f"kv-auto:text={text},dir={tmp_path / 'file'},kl=1{ONE}")
    assert report["chosen"] == "kv-quant:bits=4"
    assert "nothing is remembered" in capsys.readouterr().err
    monkeypatch.setattr(kv_auto, "cache_folder", lambda: None)
    opened(f"kv-auto:text={text},kl=1{ONE}")
    assert "there is no cache folder" in capsys.readouterr().err
    monkeypatch.setattr(kv_auto, "cache_folder", lambda: tmp_path / "cmr")
    opened(f"kv-auto:text={text},kl=1{ONE}")
    assert len(list((tmp_path / "cmr" / "kv-auto").iterdir())) == 1


def test_seconds_bound_the_measuring_and_a_later_session_goes_on(text, tmp_path, capsys):
    _, report = opened(auto(text, tmp_path, 1.0, seconds=0))
    assert report["measured"] == 0 and report["chosen"] == "f16"
    assert "3 not measured yet: more seconds than 0 would" in capsys.readouterr().err
    _, report = opened(auto(text, tmp_path, 1.0))
    assert report["measured"] == 3 and report["chosen"] == "kv-quant:bits=4"


def test_the_choice_is_a_part_of_what_caches_go_by(text, folder):
    prints = [opened(auto(text, folder, 1.0))[0].fingerprint() for _ in range(2)]
    assert prints[0] == prints[1]
    other = auto(text, folder, 1.0)
    session = cmr.Session.open(tiny(), [other])
    other.settled = ("kv-quant:bits=8",)
    assert session.fingerprint() != prints[0]


def test_one_plugin_object_serves_one_model(text, folder):
    plugin = auto(text, folder)
    opened(plugin), opened(plugin)
    with pytest.raises(cmr.PluginError, match="kv-auto has chosen for another model"):
        cmr.Session.open(tiny(512), [plugin])


# -- beside others --


def test_another_owner_of_the_cache_is_an_error_that_names_both(text, still):
    with pytest.raises(cmr.PluginError, match="kv-auto and kv-quant both provide kv_cache"):
        cmr.Session.open(tiny(), [f"kv-auto:text={text}", "kv-quant"])
    with pytest.raises(cmr.PluginError, match="attn-pages and kv-auto both provide kv_cache"):
        cmr.Session.open(tiny(), ["attn-pages", f"kv-auto:text={text}"])


@pytest.mark.parametrize("setting", ["kv-quant:bits=4", "kv-tiers:f16=64,q8=128"])
@pytest.mark.parametrize("other", BESIDE)
def test_beside_other_plugins_it_gives_what_it_gives_alone(setting, other, text, tmp_path):
    def plugins():
        return [auto(text, tmp_path, 1.0, settings=(setting,), tokens=256)]

    session = cmr.Session.open(tiny(), plugins())
    assert session.report()["kv-auto"]["chosen"] == setting
    if (other, setting[:8]) == ("prefix-cache", "kv-tiers"):
        with pytest.raises(cmr.PluginError, match="prefix-cache cannot divide what .* \\(kv-auto\\) keeps"):
            beside(other, plugins())
        return
    assert beside(other, plugins(), PROMPTS[1:]) == alone([setting], PROMPTS[1:])


# -- refusals --


@pytest.mark.parametrize(
    "options, said",
    [
        ("", "kv-auto needs text"),
        ("text={text},kl=0", "kv-auto: kl is a number of nats above 0"),
        ("text={text},kl=-1", "above 0"),
        ("text={text},kl=nan", "above 0"),
        ("text={text},kl=much", "kl wants float"),
        ("text={text},tokens=128", "tokens is 129 at least"),
        ("text={text},seconds=-1", "seconds is at least 0"),
        ("text={none}", "none.txt cannot be read: No such file"),
        ("text={folder}", "cannot be read: Is a directory"),
        ("text={binary}", "binary is not text in UTF-8: invalid start byte at byte 3"),
        ("text={short}", "short.txt is too short: [0-9]+ tokens, and measuring takes 129"),
        ("text={empty}", "empty.txt is too short"),
        ("text={text},settings=[kv-quant:bits=3]", "kv-auto: kv-quant: bits is one of"),
        ("text={text},settings=[kv-quart]", "there is no plugin 'kv-quart'"),
        ("text={text},settings=[stop-loop]", "that provide kv_cache alone, and stop-loop has on_token"),
        ("text={text},settings=[attn-window]", "attn-window has attention"),
        ("text={text},settings=[kv-auto]", "kv-auto needs text"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(options, said, text, tmp_path, still):
    (tmp_path / "binary").write_bytes(b"abc\xff")
    (tmp_path / "short.txt").write_text("Once upon a time.")
    (tmp_path / "empty.txt").write_text("")
    paths = {"text": text, "none": tmp_path / "none.txt", "folder": tmp_path, "binary": tmp_path / "binary"}
    paths |= {name: tmp_path / f"{name}.txt" for name in ("short", "empty")}
    with pytest.raises(cmr.PluginError, match=said):
        cmr.Session.open(tiny(), [f"kv-auto:{options.format(**paths)}"])


def test_a_context_that_is_too_small_is_refused(text):
    with pytest.raises(
        cmr.PluginError, match="kv-auto measures 129 tokens at least, and this context holds 100"
    ):
        cmr.Session.open(tiny(100), [f"kv-auto:text={text}"])


def test_settings_that_the_model_cannot_have_are_left_out_and_named(text, tmp_path, capsys):
    session = cmr.Session.open(MODEL, [KvAuto(text=text, kl=1.0, dir=tmp_path)])
    assert session.report()["kv-auto"]["chosen"] == "f16"
    assert "kv-quant:bits=8" in (said := capsys.readouterr().err) and "packs blocks of 32 values" in said


def test_only_the_beginning_of_a_long_text_is_read(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("x" + "ä" * kv_auto.READ)
    assert kv_auto.read_text(path) == "x" + "ä" * (kv_auto.READ // 2 - 1)


# -- the choice itself, and the contracts --


def test_of_equal_bytes_the_fastest_is_taken_and_of_equal_times_the_nearest():
    rows = {"f16": Row((0.0, 0.0), 100, 1.0), "slow": Row((0.1, 0.001), 50, 2.0)}
    assert cheapest(rows, 0.2) == "slow"
    rows["quick"] = Row((0.1, 0.19), 50, 1.0)
    assert cheapest(rows, 0.2) == "quick"
    rows["near"] = Row((0.1, 0.1), 50, 1.04)
    assert cheapest(rows, 0.2) == "near"
    assert cheapest(rows, 0.1) == "f16"  # both depths count, and the bound itself is not under it
    rows["large"] = Row((0.0, 0.0), 101, 0.1)
    assert cheapest(rows, 0.1) == "f16"
    rows["unknown"] = Row((0.0, float("nan")), 1, 0.1)
    assert cheapest(rows, 0.2) == "near"


BYTES = """
import numpy as np
import cmr

class ByteCache(cmr.LayerCache):
    def encode(self, x, keys):
        scale = np.abs(x).max(-1, keepdims=True) / 127 + 1e-12
        return np.round(x / scale).astype(np.int8), scale.astype(np.float16)

    def decode(self, packed, keys):
        values, scale = packed
        return values * scale.astype(np.float32)

@cmr.plugin
class Bytes:
    exact = False

    @cmr.hookimpl
    def kv_cache(self, model, layer):
        return ByteCache.factory(model, layer)
"""


def test_contracts_and_a_choice_from_a_file(text, tmp_path):
    path = tmp_path / "bytes.py"
    path.write_text(BYTES)
    made = lambda: KvAuto(text=text, kl=9.0, settings=(str(path),), tokens=129, dir=tmp_path / "d")  # noqa: E731
    session = cmr.Session.open(MODEL, [made()])
    assert session.report()["kv-auto"]["chosen"] == str(path)
    assert [finding for finding in check(made) if not finding.holds] == []
