"""`cmr plugins` and `cmr plugin-check NAME`: what is installed, and whether it keeps its promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cmr.cli.guard import FAILED
from cmr.cli.options import Parser
from cmr.cli.progress import Progress
from cmr.discovery import Description, available, describe
from cmr.errors import PluginError
from cmr.model import open_model
from cmr.profiles import named_profiles
from cmr.testing import Contracts, Finding, check


def list_plugins(argv: Sequence[str]) -> int:
    """List the plugins that can be named, with hooks, options and exactness; names narrow the list."""
    parser = Parser(prog="cmr plugins", description=list_plugins.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; ./file.py:Class works too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)
    rows = [_row(name, where) for name, where in _chosen(args.names).items()]
    if args.json:
        print(json.dumps({row.pop("name"): row for row in rows}, indent=2, default=str))
        return 0
    for row in rows:
        print("\n".join(_lines(row)))
    if not rows:
        print("no plugins are installed")
    for name, about in {} if args.names else named_profiles().items():
        print(f"--profile {name}\n  {about}")
    return 0


def _chosen(names: Sequence[str]) -> dict[str, str]:
    """The plugins to show and where they are; only a plugin that was named may fail the command."""
    if not names:
        return available()
    return {name: describe(name).where for name in names}


def _row(name: str, where: str) -> dict[str, Any]:
    try:
        return _facts(describe(name))
    except PluginError as error:
        return {"name": name, "where": where, "problem": str(error)}


def _facts(found: Description) -> dict[str, Any]:
    options = {
        option.name: {
            "type": option.kind_name,
            "default": option.default,
            "required": option.required,
            "help": option.help,
        }
        for option in found.options
    }
    return {
        "name": found.name,
        "where": found.where,
        "summary": found.summary,
        "exact": found.exact,
        "hooks": list(found.hooks),
        "options": options,
        **{key: value for key, value in found.declared.items() if value},
    }


def _lines(row: dict[str, Any]) -> list[str]:
    if "problem" in row:
        return [f"{row['name']}\n  {row['problem']}\n"]
    exact = {True: "exact", False: "changes tokens", None: "exact with some options"}[row["exact"]]
    lines = [f"{row['name']} ({exact}): {row['summary']}", f"  hooks      {', '.join(row['hooks'])}"]
    for name, option in row["options"].items():
        default = "required" if option["required"] else f"default {option['default']}"
        note = f": {option['help']}" if option["help"] else ""
        lines.append(f"  {name:10} {option['type']}, {default}{note}")
    for key in ("conflicts", "needs", "devices", "evidence", "told"):
        if row.get(key):
            lines.append(f"  {key:10} {', '.join(row[key])}")
    return [*lines, f"  from       {row['where']}", ""]


def check_plugin(argv: Sequence[str]) -> int:
    """Try the contracts of a plugin and say which it breaks; exit 2 if there is one."""
    parser = Parser(prog="cmr plugin-check", description=check_plugin.__doc__)
    parser.add_argument("plugin", metavar="NAME[:KEY=VALUE,...]", help="a plugin by name, or ./file.py:Class")
    parser.add_argument("-m", "--model", metavar="FILE", help="a model to try it on, instead of a toy")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)
    Contracts(args.plugin, model=object()).made()  # a wrong name or option is a mistake, not a finding
    with Progress(f"checking {args.plugin}"):
        findings = check(args.plugin, open_model(args.model) if args.model else None)
    if args.json:
        rows = {row.contract: {"holds": row.holds, "why": row.why} for row in findings}
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(map(_verdict, findings)))
    return 0 if all(row.holds for row in findings) else FAILED


def _verdict(finding: Finding) -> str:
    return f"ok     {finding.contract}" if finding.holds else f"BROKEN {finding.contract}: {finding.why}"
