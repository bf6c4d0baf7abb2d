"""`cmr plugin-new NAME`: write a plugin as a complete package that somebody else can install."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import cmr
from cmr.cli.options import Parser
from cmr.errors import RequestError

# Template name -> path in the new package; both may hold the words of `names`.
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "plugin.py.txt": "@module@.py",
    "test_plugin.py.txt": "tests/test_@module@.py",
}


def main(argv: Sequence[str]) -> int:
    """Write the package into a new folder."""
    parser = Parser(prog="cmr plugin-new", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="what users will type after --plugin, as in my-plugin")
    parser.add_argument(
        "--into", metavar="FOLDER", default=".", help="where the new folder goes (default: here)"
    )
    args = parser.parse(argv)
    folder = write(args.name, Path(args.into))
    print(f"{folder} is ready; next: pip install -e {folder}, then cmr-run ... --plugin {args.name}")
    return 0


def write(name: str, into: Path) -> Path:
    """Write the package for the plugin `name` under `into`; return its folder; RequestError if it exists."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise RequestError(
            f"a plugin's name is made of lower-case words joined by dashes, as my-plugin; got {name!r}"
        )
    folder = into / name
    if folder.exists():
        raise RequestError(f"{folder} exists already; choose another name or --into another folder")
    words = names(name)
    templates = files("cmr.cli") / "templates"
    for template, target in FILES.items():
        path = folder / _fill(target, words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_fill((templates / template).read_text("utf-8"), words), "utf-8")
    return folder


def names(name: str) -> dict[str, str]:
    """Derive a module, a class and a distribution from a plugin's name."""
    return {
        "name": name,
        "module": "cmr_" + name.replace("-", "_"),
        "class": "".join(word.capitalize() for word in name.split("-")),
        "distribution": f"cmr-{name}",
        "cmr": cmr.__version__,
    }


def _fill(text: str, words: dict[str, str]) -> str:
    return re.sub(r"@(\w+)@", lambda match: words.get(match[1], match[0]), text)
