"""Who may import whom: a module only what lies below it, so that it can be read without what is above."""

import ast
from pathlib import Path

import pytest

RUNNER = Path(__file__).parents[2] / "runner" / "cmr"
PLUGINS = Path(__file__).parents[2] / "plugins" / "cmr_plugins"

# From the ground up; a package counts as one module, and is free inside.
FLOORS = [
    {"errors", "hookspecs", "folders", "cmr"},
    {"quants", "metadata", "options", "architectures", "evidence", "diskspace"},
    {"gguf_header"},
    {"gguf_file", "rope", "router", "deltanet", "profiles"},
    {"ops", "config"},
    {"slots", "ages"},
    {"kvcache", "shapes", "tokenizer", "sampling", "chat", "sequence", "stats", "answer", "plots"},
    {"diskcache"},
    {"tiers", "weights", "arena", "state"},
    {"replay", "feed"},
    {"mix"},
    {"forward"},
    {"model", "discovery", "blame", "calls", "scheduler"},
    {"plan", "defaults"},
    {"resolve", "fingerprint", "admission", "loop"},
    {"session"},
    {"testing", "eval", "server", "forecast"},
    {"bench"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(RUNNER.rglob("*.py"))


def imports(path):
    """The names of modules that a file imports, wherever in it, as dotted texts."""
    package = ["cmr", *path.relative_to(RUNNER).parent.parts] if RUNNER in path.parents else []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from {module, *(f"{module}.{alias.name}" for alias in node.names)}


def part(dotted):
    """The module or package of cmr that a dotted name lies in; None for cmr's own names, as cmr.Session."""
    names = dotted.split(".")
    return names[1] if len(names) > 1 and names[1] in LEVEL else None


def test_every_module_has_a_floor():
    here = {path.relative_to(RUNNER).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert here - set(LEVEL) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RUNNER)))
def test_a_module_imports_only_from_floors_below(path):
    own = path.relative_to(RUNNER).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        top = name.partition(".")[0]
        assert top not in ("torch", "cmr_plugins"), f"{path.name} imports {name}"
        target = part(name) if top == "cmr" else None
        if target not in (None, own):
            assert LEVEL[target] < LEVEL[own], (
                f"{own} (floor {LEVEL[own]}) imports {target} ({LEVEL[target]})"
            )


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda path: path.name)
def test_plugins_use_only_the_public_names(path):
    import cmr

    for name in imports(path):
        if name.partition(".")[0] == "cmr" and name != "cmr":
            assert name.removeprefix("cmr.") in cmr.__all__, f"{path.name} imports {name}"
        assert name.partition(".")[0] != "torch"


def test_printing_is_for_programs():
    for path in FILES:
        if path.relative_to(RUNNER).parts[0] not in ("cli", "bench"):
            calls = [
                node.func
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.Call)
            ]
            assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)], path.name
