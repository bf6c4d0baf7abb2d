"""Sessions whose weights are mostly on the disk: what they answer, and how much memory they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PROMPTS = [[1, 2, 3], list(range(40)), [7] * 17]
MEASURE = """
import sys, cmr
def memory():
    words = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: 1024 * int(words[key].split()[0]) for key in ("VmRSS", "VmHWM")}
small = cmr.open_model(sys.argv[1])
warm = cmr.Session.open(small)
list(warm.generate(warm.request([1, 2, 3], max_tokens=4, temp=0.0)))
model = cmr.open_model(sys.argv[2])
before = memory()["VmRSS"]
session = cmr.Session.open(model, [sys.argv[3]])
list(session.generate(session.request(list(range(20)), max_tokens=40, temp=1.0, seed=1)))
print(memory()["VmHWM"] - before, model.activation_bytes)
"""


def answers(session: Any, prompts: Any = PROMPTS, n: int = 12, **options: Any) -> list[list[int]]:
    """Return what prompts give that are answered together, greedily unless options say otherwise."""
    texts = [session.add(session.request(p, max_tokens=n, **{"temp": 0.0} | options)) for p in prompts]
    while session.step():
        pass
    assert [text.error for text in texts] == [None] * len(texts)
    return [text.new for text in texts]


def check_memory(small: Path, large: Path, plugin: str, budget: int) -> None:
    """Let a process that has run a small model answer with a large one and a plugin, in no more memory than that."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large, f"{plugin}:budget={budget}"],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'runner'}:{ROOT / 'plugins'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    grown, activations = map(int, done.stdout.split())
    assert grown < 1.1 * budget + activations + (4 << 20), (grown, budget, activations)
