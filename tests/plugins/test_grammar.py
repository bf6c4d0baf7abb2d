"""grammar: every answer is in its language, whatever samples, drafts, batches and caches beside it."""

import gc
import json
import re
import sys
import weakref
from itertools import zip_longest
from pathlib import Path

import pytest
from tests.beside import BESIDE, STORY, answer, beside, tiny
from tests.cli_runs import CHAT, bundled, run
from tests.grammars import JSON
from tests.toy import MODEL, PROMPT, PROMPTS, Copies, Preempts, Together
from tests.toy import answer as toy_answer

import cmr
from cmr import PluginError, RequestError, Session, hookimpl
from cmr.cli.run import main
from cmr.discovery import describe
from cmr.testing import ToyModel, check
from cmr_plugins.grammar import tokens

NANO = Path(__file__).parents[2] / "models" / "nano-q8_0.gguf"
SEEDED = {"temp": 1.0, "seed": 5}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "fish"]}, "minItems": 1, "maxItems": 3},
        "happy": {"type": "boolean"},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
LINES = r'root ::= ("- " [a-z ]{3,12} "\n"){2,3}'
RECURSIVE = 'root ::= word | "(" root " " root ")"\nword ::= [a-z]{1,6}'
SENTENCE = r"(Yes|No), [a-z ]{3,20}[.!]"
UTF8 = "[éüß日]{2,5}→"


def is_person(text):
    """The schema PERSON, by hand."""
    found = json.loads(text)
    keys = list(found)
    assert set(keys) <= set(PERSON["properties"]) and {"name", "age", "pets"} <= set(keys)
    assert isinstance(found["name"], str) and 1 <= len(found["name"]) <= 12
    assert type(found["age"]) is int and 0 <= found["age"] <= 99
    assert 1 <= len(found["pets"]) <= 3 and set(found["pets"]) <= {"cat", "dog", "fish"}
    return isinstance(found.get("happy", True), bool)


def is_tree(text):
    """The grammar RECURSIVE, by hand: words and pairs in brackets."""
    while (shorter := re.sub(r"\([a-z]{1,6} [a-z]{1,6}\)", "w", text)) != text:
        text = shorter
    return bool(re.fullmatch(r"[a-z]{1,6}", text))


GRAMMARS = {
    "schema": ({"json_schema": PERSON}, is_person),
    "regex": ({"regex": SENTENCE}, lambda text: re.fullmatch(SENTENCE, text)),
    "lines": ({"gbnf": LINES}, lambda text: re.fullmatch(r"(- [a-z ]{3,12}\n){2,3}", text)),
    "utf-8": ({"regex": UTF8}, lambda text: re.fullmatch(UTF8, text)),
    "recursive": ({"gbnf": RECURSIVE}, is_tree),
    "lark": (
        {"lark": 'start: ("ab" | C)~2 "!"\nC: /[0-9]{1,3}/'},
        lambda text: re.fullmatch(r"(ab|\d{1,3}){2}!", text),
    ),
}


def written(session, prompt=STORY, max_tokens=200, **options):
    """An answer's text and why it ended."""
    text = session.text(prompt, max_tokens=max_tokens, **{"temp": 0.0} | options)
    return "".join(text), text.stop


# -- what is written --


@pytest.mark.parametrize("kind", GRAMMARS)
def test_every_answer_is_in_the_language(kind):
    options, holds = GRAMMARS[kind]
    session = Session.open(tiny(), [("grammar", options)])
    for sampling in ({}, *({"temp": 1.0, "seed": seed} for seed in range(16))):
        text, stop = written(session, **sampling)
        if kind == "recursive" and stop == "length":
            continue  # brackets may open for ever
        assert stop in ("grammar", "eos") and holds(text), (text, sampling)
    assert session.report()["grammar"]["compiled"] == 1


@pytest.mark.parametrize("options", [{"json_schema": {}}, {"gbnf": JSON}], ids=["schema", "gbnf"])
def test_any_json(options):
    session, ended = Session.open(tiny(), [("grammar", options)]), 0
    for seed in range(30):
        text, stop = written(session, "A list: ", temp=1.0, seed=seed, max_tokens=120)
        if stop != "length":
            json.loads(text, strict=False)  # llama.cpp's grammar has tabs within strings
            ended += 1
    assert ended > 10


@pytest.mark.parametrize(
    "sampling",
    [
        {"temp": 0.8, "seed": 1, "top_k": 5, "top_p": 0.5},
        {"temp": 1.5, "seed": 2, "min_p": 0.2, "repeat_penalty": 1.5},
        {"temp": 1.0, "seed": 3, "mirostat": 2},
        {"temp": 1.0, "seed": 4, "xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"temp": 0.0, "dry_multiplier": 0.8, "presence_penalty": 1.0},
    ],
)
def test_samplers_go_on_behind_it(sampling):
    for options, holds in GRAMMARS.values():
        text, stop = written(Session.open(tiny(), [("grammar", options)]), **sampling)
        assert stop == "length" or holds(text)


def test_an_answer_that_is_complete_ends_and_one_that_may_go_on_may_end():
    session = Session.open(tiny(), ["grammar"])
    assert written(session, plugins={"grammar": {"regex": "yes"}}, ignore_eos=True) == ("yes", "grammar")
    ends = {
        written(session, plugins={"grammar": {"regex": "[a-z]+"}}, temp=1.0, seed=s)[1] for s in range(12)
    }
    assert "eos" in ends or "length" in ends
    told = {"grammar": {"regex": r"[a-z]+(\.)?"}}
    stops = frozenset(tiny().tokenizer.encode("."))
    text = session.text(STORY, plugins=told, temp=1.0, seed=1, max_tokens=300, stop_ids=stops)
    assert "".join(text) and text.stop in ("eos", "length")  # the stop ids are the request's


def test_limits_and_stop_strings_end_it_as_usual():
    session = Session.open(tiny(), ["grammar:regex=[a-z ]{50}x"])
    text, stop = written(session, max_tokens=5)
    assert stop == "length" and re.fullmatch("[a-z ]+", text) and session.report()["tokens"] == 5
    assert written(session, max_tokens=50, stop=[" "])[1] == "stop"


def test_without_a_grammar_nothing_changes():
    session = Session.open(tiny(), ["grammar"])
    assert answer(session, STORY, **SEEDED) == answer(Session.open(tiny()), STORY, **SEEDED)
    assert answer(session, STORY, plugins={"grammar": {}}) == answer(Session.open(tiny()), STORY)
    assert session.report()["grammar"] == {"compiled": 0, "rows": 0, "us_a_row": 0.0, "completed": 0}


# -- requests --


def test_a_requests_own_grammar_comes_before_the_plugins():
    session = Session.open(tiny(), ["grammar:regex=[0-9]{3}"])
    assert re.fullmatch("[0-9]{3}", written(session)[0])
    assert re.fullmatch("[x-z]{2}", written(session, plugins={"grammar": {"regex": "[x-z]{2}"}})[0])
    assert re.fullmatch("[0-9]{3}", written(session, plugins={"grammar": {}})[0])


def test_requests_with_grammars_of_their_own_run_by_turns():
    told = [{"grammar": options} for options, _ in GRAMMARS.values()] + [{}]
    alone = [written(Session.open(tiny(), ["grammar"]), plugins=each, **SEEDED) for each in told]
    for plugins in (["batching"], []):
        session = Session.open(tiny(), ["grammar", *plugins])
        texts = [session.text(STORY, plugins=each, max_tokens=200, **SEEDED) for each in told]
        found = ["".join(pieces) for pieces in zip(*zip_longest(*texts, fillvalue=""))]
        assert list(zip(found, (text.stop for text in texts))) == alone


def test_grammars_are_compiled_once_and_not_without_end(monkeypatch):
    monkeypatch.setattr("cmr_plugins.grammar.KEPT", 3)
    session = Session.open(MODEL, ["grammar"])
    for n in (1, 2, 3, 1, 2, 3):
        written(session, "ab", plugins={"grammar": {"regex": f"x{{{n}}}"}})
    assert session.report()["grammar"]["compiled"] == 3
    for n in (4, 1):
        written(session, "ab", plugins={"grammar": {"regex": f"x{{{n}}}"}})
    plugin = session.plan.plugins["grammar"]
    assert plugin.compiled == 5 and len(plugin.ready) == 3


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"gbnf": "root ::="}, None),
        (
            {"gbnf": 'root ::= "a'},
            "the gbnf cannot be read: line 1: the end of a literal or class is expected",
        ),
        ({"json_schema": "{"}, "the json_schema cannot be read"),
        ({"json_schema": "[1]"}, "a JSON schema is an object, or true or false"),
        ({"json_schema": {"type": "strin"}}, "the json_schema cannot be used"),
        ({"json_schema": {"type": {1, 2}}}, "json_schema is no JSON"),
        ({"regex": "("}, "the regex cannot be used"),
        ({"regex": 3}, "regex is a text, not 3"),
        ({"lark": "start: nothing"}, "the lark cannot be used"),
        ({"regex": "a", "gbnf": 'root ::= "a"'}, "gbnf and regex are two grammars; give one"),
        ({"regexp": "a"}, "grammar takes from a request no option 'regexp'; did you mean 'regex'"),
        ({"file": "/etc/passwd"}, "grammar takes from a request no option 'file'"),
    ],
)
def test_a_request_whose_grammar_is_none_is_refused_before_anything_runs(told, said):
    session = Session.open(MODEL, ["grammar"])
    if said is None:  # an empty text is a text
        assert written(session, plugins={"grammar": told}) == ("", "eos")
        return
    with pytest.raises(RequestError, match=re.escape(said)):
        session.text(PROMPT, plugins={"grammar": told})
    assert session.report()["steps"] == 0


def test_a_grammar_that_no_token_satisfies_says_so():
    for plugins in ([], [Copies()]):
        session = Session.open(MODEL, ["grammar", *plugins])
        with pytest.raises(RequestError, match="no token of this model can go on from here"):
            written(session, plugins={"grammar": {"regex": "aé"}})
        assert written(session, plugins={"grammar": {"regex": "ab"}}) == ("ab", "grammar")


def test_what_forces_tokens_behind_it_is_found_out():
    class Forces:
        @hookimpl
        def on_logits(self, logits):
            logits[:, 5] = 1e9

    with pytest.raises(PluginError, match="grammar: token 5 was chosen against the grammar"):
        written(Session.open(MODEL, ["grammar:regex=[a-f]+", Forces()]))


# -- beside other plugins --


@pytest.fixture(scope="module")
def alone():
    """Tokens of each grammar alone, greedy and seeded."""
    return {
        (kind, seed): [
            answer(Session.open(tiny(), [("grammar", options)]), p, 60, **sampling) for p in (STORY, "Tom")
        ]
        for kind, (options, _) in GRAMMARS.items()
        for seed, sampling in ((0, {}), (5, SEEDED))
    }


DRAFTERS = ("spec-lookup:gain=0", f"spec-draft:model={NANO},gain=0,depth=3,threads=1", "spec-exit:gain=0")


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("other", BESIDE)
def test_tokens_are_those_of_grammar_alone(alone, kind, other):
    plugins = [("grammar", GRAMMARS[kind][0])]
    for seed, sampling in ((0, {}), (5, SEEDED)):
        assert beside(other, plugins, (STORY, "Tom"), max_tokens=60, **sampling) == alone[kind, seed]


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda text: text.partition(":")[0])
@pytest.mark.parametrize("first", [True, False])
def test_drafts_change_nothing(alone, kind, drafter, first):
    plugins = (
        [("grammar", GRAMMARS[kind][0]), drafter] if first else [drafter, ("grammar", GRAMMARS[kind][0])]
    )
    session = Session.open(tiny(), plugins)
    for seed, sampling in ((0, {}), (5, SEEDED)):
        assert [answer(session, p, 60, **sampling) for p in (STORY, "Tom")] == alone[kind, seed]
    assert session.report()["drafted"] > 0 or drafter.startswith("spec-lookup")


def test_drafts_are_taken_where_the_grammar_wants_what_was_there_before():
    line = '{"name": "Tom", "age": 3, "pets": ["cat"]}\n'
    session = Session.open(tiny(), [("grammar", {"json_schema": PERSON}), "spec-lookup:gain=0"])
    plain = written(Session.open(tiny(), [("grammar", {"json_schema": PERSON})]), line * 4)
    assert written(session, line * 4) == plain
    assert session.report()["accepted"] > 0


@pytest.mark.parametrize("kind", ["regex", "recursive"])
def test_a_preempted_answer_goes_on_where_it_was(kind):
    options, holds = GRAMMARS[kind]
    plugins = [("grammar", options)]
    plain = [toy_answer(Session.open(MODEL, plugins), prompt, 40, **SEEDED) for prompt in PROMPTS]
    for more in ([Preempts()], [Preempts(), Copies()], [Together(3), Copies()]):
        session = Session.open(MODEL, [*plugins, *more], chunk=5)
        texts = [session.text(prompt, max_tokens=40, **SEEDED) for prompt in PROMPTS]
        for _ in zip_longest(*texts):
            pass
        assert [text.seq.new for text in texts] == plain


@pytest.mark.parametrize(
    "other",
    ["kv-quant:bits=4", "kv-evict:policy=snapkv,budget=64", "attn-window:window=64", "early-exit:sure=0.7",
     "kv-tiers:f16=64,q8=0", "stop-loop", "telemetry", "budget:answer=150"],
)  # fmt: skip
def test_what_changes_tokens_otherwise_stays_in_the_language(other):
    for options, holds in GRAMMARS.values():
        text, stop = written(Session.open(tiny(), [("grammar", options), other]), **SEEDED)
        assert stop in ("length", "loop", "budget") or holds(text)


@pytest.mark.parametrize("policy", ["shift", "page,top=2,size=16"])
def test_it_goes_on_behind_the_end_of_the_context(policy):
    plugins = [f"context:policy={policy}", r'grammar:regex="([a-z]+ ){200}x"']
    session = Session.open(tiny(128), plugins, context=128)
    text, stop = written(session, "Once", max_tokens=400)
    assert (stop == "length" and re.fullmatch("([a-z]+ ?)+", text)) or re.fullmatch("([a-z]+ ){200}x", text)
    assert session.report()["tokens"] > 128


def test_stored_answers_are_those_of_the_same_grammar(tmp_path):
    session = Session.open(tiny(), ["grammar", f"answer-cache:path={tmp_path}"])
    told = [{}, {"regex": "[ab]{4}"}, {"regex": "[cd]{4}"}, {"json_schema": {"enum": ["a", "b"]}}]
    texts = [[written(session, plugins={"grammar": each})[0] for each in told] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 4
    report = session.report()["answer-cache"]
    assert report["hits"] == report["misses"] == 4
    other = Session.open(tiny(), ["grammar:regex=[ab]{4}", f"answer-cache:path={tmp_path}"])
    written(other)
    assert other.report()["answer-cache"]["hits"] == 0  # with the grammar as the plugin's it is another plan


# -- options --


def test_a_file_holds_any_kind(tmp_path):
    for name, text in (
        ("a.gbnf", 'root ::= "ab"'),
        ("a.json", '{"const": "ab"}'),
        ("a.regex", "ab"),
        ("a.lark", 'start: "ab"'),
    ):
        (tmp_path / name).write_text(text)
        session = Session.open(MODEL, [f"grammar:file={tmp_path / name}"])
        assert written(session)[0].strip('"') == "ab"
    (tmp_path / "b.txt").write_text("x{2}")
    assert written(Session.open(MODEL, [f"grammar:file={tmp_path / 'b.txt'},kind=regex"]))[0] == "xx"


def test_what_is_in_a_file_tells_plans_apart(tmp_path):
    file, prints = tmp_path / "a.regex", []
    for text in ("a", "b", "a"):
        file.write_text(text)
        prints.append(Session.open(MODEL, [f"grammar:file={file}"]).fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_a_profile_may_hold_a_schema_as_a_table(tmp_path):
    profile = tmp_path / "p.toml"
    profile.write_text('[plugins.grammar.json_schema]\nenum = ["a,b", "c"]\n')
    assert written(Session.open(tiny(), profile=profile))[0] in ('"a,b"', '"c"')
    profile.write_text("[plugins.grammar]\ngbnf = '''\nroot ::= \"a\" | \"b\"\n'''\n")
    assert written(Session.open(tiny(), profile=profile))[0] in ("a", "b")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("gbnf=root", "the gbnf cannot be read: line 1: '::=' is expected, and there is the end"),
        ('gbnf=a ::= "b"', "there is no rule 'root'; there are: a"),
        ("gbnf=root ::= a b", "there is no rule 'a'; there are: root"),
        ('gbnf=root ::= "a" )', "line 1: the end of the rule is expected, and there is ')'"),
        ('gbnf=root ::= ("a"', "line 1: ')' is expected"),
        (r'gbnf=root ::= "\q"', r"\q is no escape; there are \xHH"),
        (r'gbnf=root ::= "\uD800"', r"\uD800 is no character of Unicode"),
        ("gbnf=root ::= [b-a]", "a class has the range b-a, which holds nothing"),
        ("gbnf=root ::= []", "a class of no characters allows nothing"),
        ('gbnf=root ::= "a"{3,2}', "at least more than at most"),
        ('gbnf=root ::= "a"\nroot ::= "b"', "the rule 'root' is there twice"),
        ("gbnf=" + "root ::= " + "(" * 5000, "the gbnf is nested too deeply"),
        ("json_schema={", "the json_schema cannot be read"),
        ("json_schema=3", "a JSON schema is an object, or true or false"),
        (
            'json_schema={"type":"object","uniqueItems":true,"dependentSchemas":{}}',
            "the json_schema cannot be used",
        ),
        ("regex=[", "the regex cannot be used"),
        ("regex=a,json_schema={}", "json_schema and regex are two grammars; give one"),
        ("regex=a,file=b", "regex and file are two grammars; give one"),
        ("kind=regex", "kind says what is in a file; add file="),
        ("file=nowhere.gbnf", "nowhere.gbnf cannot be read: No such file"),
        ("file=nowhere", "the name of nowhere does not tell what it holds; add kind=gbnf"),
        ("file=a,kind=xml", "kind wants 'gbnf' or 'json_schema' or 'regex' or 'lark' or none, got 'xml'"),
        ("gramar=a", "grammar has no option 'gramar'"),
    ],
)
def test_what_is_no_grammar_is_refused(options, said):
    with pytest.raises(PluginError, match=re.escape(said)):
        cmr.discovery.load([f"grammar:{options}"])


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PluginError, match=re.escape("pip install 'cmr-runner[grammar]'")):
        Session.open(MODEL, ["grammar"])
    assert describe("grammar").exact is False


@pytest.mark.parametrize("options", ["", ":regex=[a-z ]{5}x*", ':json_schema={"maxLength":20}'])
def test_it_keeps_the_contracts(options):
    assert [finding for finding in check(f"grammar{options}") if not finding.holds] == []


def test_the_vocabulary_is_made_once_for_a_model_and_goes_with_it():
    model = ToyModel()
    kept = weakref.ref(model.tokenizer)
    for _ in range(2):
        written(Session.open(model, ["grammar:regex=a"]), "x")
    made = [view for key, view in tokens._MADE.items() if key is model.tokenizer]
    assert len(made) == 1
    del model, made
    gc.collect()
    assert kept() is None


# -- the command line --


def flagged(capfd, *flags):
    """Run cmr-run in this process; its status, text, and complaints."""
    status = main([bundled(), "-p", "Her name was", "-n", "200", "--temp", "0", *flags])
    return status, *capfd.readouterr()


@pytest.mark.parametrize("flag", ["-j", "--json-schema", "-jf", "--json-schema-file"])
def test_flags_for_schemas(flag, capfd, tmp_path):
    value = json.dumps(PERSON)
    if flag.endswith("f") or flag.endswith("file"):
        (tmp_path / "schema").write_text(value)
        value = str(tmp_path / "schema")
    status, out, err = flagged(capfd, flag, value)
    assert status == 0 and is_person(out) and "end: grammar" in err and "us_a_row" in err


def test_flags_for_grammars(capfd, tmp_path):
    (tmp_path / "g").write_text(LINES)
    for flags in (["--grammar", LINES], ["--grammar-file", str(tmp_path / "g")]):
        assert re.fullmatch(r"(- [a-z ]{3,12}\n){2,3}", flagged(capfd, *flags)[1])
    status, out, _ = flagged(capfd, "--grammar", LINES, "--json")
    assert json.loads(out)["stop"] in ("grammar", "eos")
    status, out, _ = flagged(capfd, "-j", "{}", "--explain")
    assert status == 0 and "grammar:" in out and "on_logits      grammar" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--grammar", "root"], "grammar: the gbnf cannot be read: line 1"),
        (["--grammar", ""], "--grammar: wants a text, got an empty one"),
        (["-j", "{"], "grammar: the json_schema cannot be read: Expecting property name"),
        (["-j", '{"type":"x"}'], "grammar: the json_schema cannot be used"),
        (["--grammar-file", "nowhere"], "grammar: nowhere cannot be read: No such file"),
        (["-jf", "nowhere"], "grammar: nowhere cannot be read: No such file"),
        (["-j", "{}", "--grammar", 'root ::= "a"'], "2 grammars were given; choose one of --grammar, -j"),
        (
            ["-j", "{}", "--plugin", "grammar:regex=a"],
            "grammar: json_schema and regex are two grammars; give one",
        ),
    ],
)
def test_flags_that_cannot_be_honoured_are_one_sentence(flags, said, capfd):
    status, out, err = flagged(capfd, *flags)
    (line,) = err.splitlines()
    assert (status, out) == (2, "") and line.startswith("cmr-run: ") and said in line


def test_each_answer_of_a_chat_is_anew_under_the_grammar():
    schema = '{"enum": ["yes", "no", "maybe"]}'
    result = run(bundled(), "-cnv", *CHAT, "--temp", "0", "-j", schema, typed="Hi\nAnd you?\nReally?\n")
    answers = result.stdout.split()
    assert (
        result.returncode == 0
        and len(answers) == 3
        and {json.loads(a) for a in answers} <= {"yes", "no", "maybe"}
    )
    single = run(bundled(), "-st", *CHAT, "-p", "Hi", "--temp", "0", "-j", schema, "--json")
    assert json.loads(json.loads(single.stdout)["text"]) in ("yes", "no", "maybe")
