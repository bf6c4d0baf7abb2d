"""telemetry: a line for each step that adds up to the session's own figures."""

import json
import sys

import pytest
from tests.toy import MODEL, PROMPT, Copies, Together, answer, run

from cmr import PluginError, Session
from cmr.testing import check


def test_lines_add_up(tmp_path):
    path = tmp_path / "steps.jsonl"
    session = Session.open(MODEL, [f"telemetry:path={path}", Copies(), Together(rows=8)])
    list(session.stream([session.request(p, max_tokens=9, temp=0.0, id=p) for p in ("abc", PROMPT)]))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    figures = session.report()
    assert [line["step"] for line in steps] == list(range(1, figures["steps"] + 1))
    for ours, theirs in (("prompt_rows", "prompt_tokens"), ("tokens", "tokens"), ("drafted", "drafted")):
        assert sum(line[ours] for line in steps) == figures[theirs]
    assert max(line["sequences"] for line in steps) == 2
    assert all(a["t"] <= b["t"] for a, b in zip(lines, lines[1:]))
    ends = {line["request"]: line for line in lines if "request" in line}
    assert ends["abc"] == ends["abc"] | {"prompt": 3, "tokens": 9, "reason": "length"}
    report = figures["telemetry"]
    assert report["steps"] == len(steps) and 0 < report["mean_ms"] <= report["slowest_ms"]


def test_a_live_line_only_where_it_does_not_disturb_the_text(monkeypatch, capsys):
    for stderr, stdout, shows in ((True, False, True), (True, True, False), (False, False, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=stderr: answer)
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=stdout: answer)
        session = Session.open(MODEL, ["telemetry"])
        session.plan.plugins["telemetry"].shown = -1e9
        answer(session, max_tokens=3)
        shown = capsys.readouterr()
        assert ("tok/s" in shown.err) is shows and shown.out == ""
        assert not shows or shown.err.endswith("\r\x1b[K")


def test_nothing_changes_and_the_contracts_hold():
    assert run("telemetry") == run()
    assert [finding for finding in check("telemetry") if not finding.holds] == []


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(PluginError, match="telemetry: .*no/file cannot be written: No such file"):
        Session.open(MODEL, [f"telemetry:path={tmp_path}/no/file"])
