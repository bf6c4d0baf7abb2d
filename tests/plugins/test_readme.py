"""plugins/README.md is true: signatures, sentences, tables; every example runs and keeps the contracts."""

import inspect
import re
from pathlib import Path

import pytest
from tests.toy import MODEL, PROMPTS, answer

from cmr import Session, discovery, hookspecs
from cmr.testing import check

TEXT = (Path(__file__).parents[2] / "plugins" / "README.md").read_text("utf-8")
HOOKS = hookspecs.HOOKS
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
PLUGINS = [block for block in BLOCKS if "@cmr.plugin" in block]
NAMES = [re.search(r"^class (\w+):", block, re.M)[1] for block in PLUGINS]


def section(hook):
    """The text between a hook's heading and the next."""
    return re.search(rf"^### `{hook}\((.*?)\)`\n\n(.*?)(?=^#)", TEXT, re.M | re.S)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_there_with_its_arguments_and_its_sentence(hook):
    spec = getattr(hookspecs, hook)
    found = section(hook)
    assert found, f"{hook} has no section"
    assert found[1] == ", ".join(inspect.signature(spec).parameters)
    assert " ".join(found[2].partition("\n\n")[0].split()) == inspect.getdoc(spec)


def test_every_hook_is_described_once():
    assert sorted(re.findall(r"^### `(\w+)\(", TEXT, re.M)) == sorted(HOOKS)


def test_every_hook_is_in_an_example():
    code = "\n".join(BLOCKS)
    assert [hook for hook in HOOKS if f"def {hook}(self" not in code] == []


@pytest.mark.parametrize("block", PLUGINS, ids=NAMES)
def test_every_example_runs_and_keeps_the_contracts(block, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(block)
    cls, _ = discovery.find(str(path))
    session = Session.open(MODEL, [str(path)])
    for prompt in PROMPTS:
        assert len(answer(session, prompt, max_tokens=12)) >= 1
    session.report()
    assert [finding for finding in check(cls) if not finding.holds] == []


def test_the_other_examples_run(capsys):
    for block in BLOCKS:
        if block not in PLUGINS:
            exec(compile(block, "README", "exec"), {})
    assert "broken" not in capsys.readouterr().out


def test_the_table_lists_the_official_plugins():
    rows = re.findall(r"^\| `([a-z-]+)` \| [^|]*\| ([^|]*?) \|", TEXT, re.M)
    listed = {name for name, _ in rows if name in discovery.BUILTIN}
    assert listed == set(discovery.BUILTIN)
    for name, tokens in rows:
        if name in discovery.BUILTIN:
            exact = discovery.describe(name).exact
            assert tokens.startswith({True: "exact", False: "change", None: "exact with"}[exact]), name


def test_the_declarations_are_those_that_count():
    table = TEXT[TEXT.index("**Declarations**") : TEXT.index("# The hooks")]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.M))
    assert {name: eval(default) for name, default in rows.items()} == discovery.DECLARED
