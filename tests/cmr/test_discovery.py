"""Finding plugins, reading their options, and saying what is wrong with either."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from tests.toy import MODEL, Sees, answer, run

import cmr
from cmr import PluginError, RequestError, Session, discovery, hookimpl, plugin
from cmr.discovery import available, describe, load, parse, plugin_name
from cmr.options import coerce, fill, hint, kind_name, split
from cmr.profiles import read_profile


@plugin
class KVPolicy:
    """Evict something."""

    exact = False
    bits: Annotated[int, "bits of a value"] = 4
    rate: float = 0.5
    rotate: bool = False
    name: str = "x"
    path: Path | None = None
    kind: Literal["f16", "q8_0"] = "f16"
    layers: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    words: list[str] | None = None
    table: dict[str, Any] | None = None

    @hookimpl
    def on_step(self, step):
        pass


@plugin
class Strict:
    """Wants a path and few bits."""

    exact = True
    path: str
    bits: int = 8

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"bits is 4 or 8, not {self.bits}")

    @hookimpl
    def on_step(self):
        pass


# -- texts --


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("kv-quant", ("kv-quant", {})),
        ("kv-quant:bits=4,rotate", ("kv-quant", {"bits": "4", "rotate": "true"})),
        ("a:layers=[0,1],b=c:d", ("a", {"layers": "[0,1]", "b": "c:d"})),
        ("a:text=x=y", ("a", {"text": "x=y"})),
        ("./mine.py:MyPlugin", ("./mine.py:MyPlugin", {})),
        ("./mine.py:MyPlugin:bits=4", ("./mine.py:MyPlugin", {"bits": "4"})),
        ("/a/b.py:bits=4", ("/a/b.py", {"bits": "4"})),
        (r"C:\a\b.py:Mine:x=1", (r"C:\a\b.py:Mine", {"x": "1"})),
        ("a:", ("a", {})),
        ("a:x=[1,[2,3]],y", ("a", {"x": "[1,[2,3]]", "y": "true"})),
        ('a:x={"b":[1,2],"c":{}},y=1', ("a", {"x": '{"b":[1,2],"c":{}}', "y": "1"})),
        ('a:x=b "," c,y=1', ("a", {"x": 'b "," c', "y": "1"})),
        (r'a:x="b\d{1,2},\"",y="1', ("a", {"x": r'b\d{1,2},"', "y": '"1'})),
        ("a:x=b]],y={1", ("a", {"x": "b]]", "y": "{1"})),
        ("a:x=b\nc,y=[^:]+\\.py", ("a", {"x": "b\nc", "y": "[^:]+\\.py"})),
    ],
)
def test_a_plugin_as_text(text, parsed):
    assert parse(text) == parsed


@pytest.mark.parametrize("text", ["", ":bits=4"])
def test_a_text_without_a_name(text):
    with pytest.raises(PluginError, match="does not name a plugin; write NAME or NAME:key=value"):
        parse(text)


@pytest.mark.parametrize(
    ("cls", "name"),
    [("KVQuant", "kv-quant"), ("StopLoop", "stop-loop"), ("A", "a"), ("Use2Bits", "use2-bits")],
)
def test_a_class_has_a_name(cls, name):
    assert plugin_name(type(cls, (), {})) == name


# -- options --


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("bits", "8", 8),
        ("bits", 8, 8),
        ("rate", "1e-3", 1e-3),
        ("rate", 1, 1.0),
        ("rotate", "true", True),
        ("rotate", "On", True),
        ("rotate", "no", False),
        ("rotate", True, True),
        ("name", "7", "7"),
        ("path", "a/b", Path("a/b")),
        ("path", "none", None),
        ("kind", "q8_0", "q8_0"),
        ("layers", "[0, 3]", (0, 3)),
        ("layers", "0+3", (0, 3)),
        ("layers", "[]", ()),
        ("layers", [0, 3], (0, 3)),
        ("pair", "[3,4]", (3, 4.0)),
        ("words", "a+b", ["a", "b"]),
        ("table", {"a": 1}, {"a": 1}),
    ],
)
def test_options_become_what_they_are_declared_as(option, text, value):
    found = getattr(fill(KVPolicy, "kv-policy", {option: text}), option)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bit": "4"}, "kv-policy has no option 'bit'; did you mean 'bits'?"),
        (
            {"zzz": "4"},
            "kv-policy has no option 'zzz'; there are: bits, kind, layers, name, pair, path, rate, rotate",
        ),
        ({"bits": "four"}, "kv-policy: bits wants int, got 'four'"),
        ({"bits": 4.5}, "kv-policy: bits wants int, got 4.5"),
        ({"bits": True}, "kv-policy: bits wants int, got True"),
        ({"rotate": "maybe"}, "kv-policy: rotate wants bool, got 'maybe'"),
        ({"rotate": 1}, "kv-policy: rotate wants bool, got 1"),
        ({"kind": "q4_0"}, "kv-policy: kind wants 'f16' or 'q8_0', got 'q4_0'"),
        ({"layers": "a"}, "kv-policy: layers wants several int, got 'a'"),
        ({"layers": 3}, "kv-policy: layers wants several int, got 3"),
        ({"pair": "[1]"}, "kv-policy: pair wants several int, got"),
        ({"path": 3}, "kv-policy: path wants Path or none, got 3"),
        ({"table": "a"}, "kv-policy: table wants several str or none, got 'a'|table wants"),
    ],
)
def test_wrong_options_are_refused_in_the_users_words(values, message):
    with pytest.raises(PluginError, match=message.replace("[", r"\[").replace("?", r"\?")):
        fill(KVPolicy, "kv-policy", values)


def test_a_missing_or_impossible_option_is_refused():
    with pytest.raises(PluginError, match="strict needs path, as in strict:path=VALUE"):
        fill(Strict, "strict", {})
    with pytest.raises(PluginError, match="strict: bits is 4 or 8, not 3"):
        fill(Strict, "strict", {"path": "a", "bits": "3"})
    assert fill(Strict, "strict", {"path": "a"}).bits == 8


def test_dashes_in_options_are_underscores():
    @plugin
    class Two:
        exact = True
        two_words: int = 1

        @hookimpl
        def on_step(self):
            pass

    assert fill(Two, "two", {"two-words": "3"}).two_words == 3


def test_small_words():
    assert split("") == {} and hint("x", []) == "; there are none"
    assert coerce("none", int | None) is None and kind_name(int | None) == "int or none"
    assert kind_name(Any) == "Any" or "Any" in kind_name(Any)


def test_plugins_are_compared_by_identity():
    assert KVPolicy() != KVPolicy() and len({KVPolicy(), KVPolicy()}) == 2


def test_a_declaration_written_as_an_option_is_refused():
    with pytest.raises(PluginError, match="exact is a declaration; write exact = ..., without a type"):

        @plugin
        class Wrong:
            exact: bool = True


# -- loading --


def test_an_unknown_plugin_gets_a_suggestion_or_the_list():
    with pytest.raises(PluginError, match="there is no plugin 'stop-lop'; did you mean 'stop-loop'?"):
        load(["stop-lop"])
    with pytest.raises(PluginError, match="there is no plugin 'zzzz'; there are: .*budget"):
        load(["zzzz"])


def test_only_what_is_named_is_imported():
    code = (
        "import sys, cmr.discovery as d; d.available(); d.load(['stop-loop']); "
        "print(sorted(m for m in sys.modules if m.startswith('cmr_plugins.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env())
    assert done.stdout.strip() == "['cmr_plugins.stop_loop']", done.stderr


def test_every_builtin_is_there_and_describes_itself():
    assert set(discovery.BUILTIN) <= set(available())
    for name in discovery.BUILTIN:
        found = describe(name)
        assert found.name == name and found.summary.endswith(".") and found.hooks
        assert found.exact in (True, False, None)


def test_describe_lists_options_with_their_help():
    found = describe(f"{__file__}:KVPolicy")
    option = found.options[0]
    assert (option.name, option.kind_name, option.default, option.help) == (
        "bits",
        "int",
        4,
        "bits of a value",
    )
    assert found.name == "kv-policy" and found.exact is False and found.hooks == ("on_step",)


FILE = """
import cmr

@cmr.plugin
class {name}:
    exact = True
    bits: int = 4

    @cmr.hookimpl
    def on_token(self, seq, token):
        return "bits" if seq.n_new == self.bits else None
"""


def test_a_plugin_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(name="MyPlugin"))
    for text in (f"{path}:MyPlugin:bits=3", f"{path}:bits=3"):
        session = Session.open(MODEL, [text])
        assert answer(session) == run()[:3] and list(session.plan.plugins) == ["my-plugin"]
    path.write_text(FILE.format(name="One") + FILE.format(name="Two"))
    with pytest.raises(PluginError, match="mine.py holds 2 plugins; name one, as in .*mine.py:One"):
        load([str(path)])
    with pytest.raises(PluginError, match="mine.py has no plugin 'Tow'; did you mean 'Two'?"):
        load([f"{path}:Tow"])
    with pytest.raises(PluginError, match="plugin file .*other.py does not exist"):
        load([f"{tmp_path}/other.py:One"])
    path.write_text("import nothing_of_this_name")
    with pytest.raises(PluginError, match="mine.py cannot be imported: ModuleNotFoundError"):
        load([f"{path}:One"])
    path.write_text("x = 1")
    with pytest.raises(PluginError, match="mine.py holds 0 plugins"):
        load([str(path)])


def test_an_installed_plugin_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "outside_plugin.py").write_text(FILE.format(name="Outside"))
    info = tmp_path / "cmr_outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cmr-outside\nVersion: 1.0\n")
    points = "[cmr.plugins]\noutside = outside_plugin:Outside\nbroken = outside_plugin:Nothing\n"
    (info / "entry_points.txt").write_text(points + "stop-loop = outside_plugin:Outside\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert available()["outside"] == "outside_plugin:Outside"
    assert available()["stop-loop"] == discovery.BUILTIN["stop-loop"]
    assert answer(Session.open(MODEL, ["outside:bits=2"])) == run()[:2]
    with pytest.raises(
        PluginError, match=r"broken \(outside_plugin:Nothing\) cannot be imported: AttributeError"
    ):
        load(["broken"])
    other = tmp_path / "cmr_double-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: cmr-double\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[cmr.plugins]\noutside = outside_plugin:Outside\n")
    with pytest.raises(PluginError, match="outside is offered by cmr-double and cmr-outside; uninstall one"):
        load(["outside"])


def test_wrong_hooks_and_arguments_are_refused():
    class Typo:
        @hookimpl
        def on_tokn(self):
            pass

    class Argument:
        @hookimpl
        def on_token(self, seq, tokn):
            pass

    class Nothing:
        pass

    with pytest.raises(PluginError, match="typo: there is no hook 'on_tokn'; did you mean 'on_token'?"):
        load([Typo()])
    with pytest.raises(PluginError, match="argument: on_token has no argument 'tokn'; did you mean 'token'?"):
        load([Argument()])
    with pytest.raises(PluginError, match="nothing implements no hook; mark its methods with @cmr.hookimpl"):
        load([Nothing()])


def test_objects_and_texts_mix_and_names_must_differ(tmp_path):
    pm = load([Sees(), "stop-loop:times=9"])
    assert [name for name, _ in reversed(pm.list_name_plugin())] == ["sees", "stop-loop"]
    (tmp_path / "a.py").write_text(FILE.format(name="Sees"))
    with pytest.raises(PluginError, match="two plugins are called sees; give one of them another name"):
        load([Sees(), f"{tmp_path}/a.py"])


def test_a_pair_is_a_name_with_values_as_they_are(tmp_path):
    pm = load([("stop-loop", {"times": 9}), ("budget", {"closing": "a,b"})])
    assert pm.get_plugin("stop-loop").times == 9 and pm.get_plugin("budget").closing == "a,b"
    profile = tmp_path / "p.toml"
    profile.write_text("[plugins.stop-loop]\ntimes = 3\nspan = 7\n")
    made = load([("stop-loop", {"times": 9})], profile).get_plugin("stop-loop")
    assert (made.times, made.span) == (9, 7)
    with pytest.raises(PluginError, match="stop-loop has no option 'time'; did you mean 'times'?"):
        load([("stop-loop", {"time": 9})])


# -- profiles --


def test_a_profile_brings_plugins_and_run_options(tmp_path):
    path = tmp_path / "fast.toml"
    path.write_text("temp = 0.0\nmax-tokens = 5\nchunk = 8\n[plugins.stop-loop]\ntimes = 7\nspan = 3\n")
    session = Session.open(MODEL, ["stop-loop:times=9"], profile=path)
    (stop,) = session.plan.plugins.values()
    assert (stop.times, stop.span, session.loop.scheduler.chunk) == (9, 3, 8)
    assert len("".join(session.text("abc"))) == 5
    assert len("".join(session.text("abc", max_tokens=2))) == 2
    assert session.request("abc").sampling.temp == 0.0
    assert session.request("abc", temperature=0.5).sampling.temp == 0.5


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("temp = ", PluginError, "is not TOML"),
        ("plugins = 3", PluginError, "plugins are tables"),
        ("[plugins]\nstop-loop = 3", PluginError, "plugins are tables"),
        (
            "[plugin.x]\na = 1",
            PluginError,
            r"has a table \[plugin\]; there are: run options, \[plugins.NAME\]",
        ),
        ("[plugins.stop-lop]", PluginError, "did you mean 'stop-loop'"),
        (
            "[plugins.stop-loop]\ntime = 3",
            PluginError,
            "stop-loop has no option 'time'; did you mean 'times'",
        ),
        ("[plugins.stop-loop]\ntimes = 'x'", PluginError, "stop-loop: times wants int, got 'x'"),
        ("tmp = 1", RequestError, "a request has no option 'tmp'; did you mean 'temp'"),
        ("chunk = 0", RequestError, "chunk is 0; it must be a whole number of at least 1"),
        ("context = 100000", RequestError, "context 100000 is more than the 1024 that the model is open for"),
    ],
)
def test_a_profile_that_cannot_be_honoured(tmp_path, text, error, message):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        Session.open(MODEL, profile=str(path))


def test_a_profile_that_is_not_there():
    with pytest.raises(PluginError, match="profile nowhere.toml cannot be read: No such file"):
        read_profile("nowhere.toml")


# -- the package --


def _env():
    root = Path(__file__).parents[2]
    return {"PYTHONPATH": f"{root}/runner:{root}/plugins", "PATH": ""}


def test_importing_the_package_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; t = time.perf_counter(); import cmr; t = time.perf_counter() - t; "
        "heavy = {'numpy', 'numba', 'pluggy', 'jinja2', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy; print(t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env())
    assert float(done.stdout) < 0.3, done.stderr


def test_the_public_names_are_there():
    for name in cmr.__all__:
        assert getattr(cmr, name) is not None and name in dir(cmr)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cmr.nothing  # noqa: B018
