"""Memory beyond the model file, cold start and warm start, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from cmr.bench.llama_worker import resident
from cmr.errors import RequestError

PROMPT = "Once upon a time"


def memory(path: str, context: int, threads: int, plugins: Sequence[str] = ()) -> dict[str, int]:
    """Return the bytes beyond mapped files of a process that has filled so much context, and holds it.

    "idle" is what it took before the model was opened, "predicted" what it had when its session was open with what
    the plan said it would take. Raises RequestError where the system cannot tell.
    """
    about = json.dumps({"path": path, "context": context, "threads": threads, "plugins": list(plugins)})
    return json.loads(_output([sys.executable, "-m", "cmr.bench.footprint", about]))


def start_times(path: str, rounds: int = 3) -> dict[str, list[float]]:
    """Return seconds from the start of `cmr-run` to its first text, "cold" (no kernels kept) and "warm"."""
    with tempfile.TemporaryDirectory(prefix="cmr-bench-") as cache:
        cold = _first_text(path, cache)
        return {"cold": [cold], "warm": [_first_text(path, cache) for _ in range(rounds)]}


def _first_text(path: str, cache: str) -> float:
    flags = ["-p", PROMPT, "-n", "32", "--temp", "0", "--ignore-eos"]
    command = [sys.executable, "-m", "cmr.cli.run", path, *flags]
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(CMR_CACHE=cache, NUMBA_CACHE_DIR=cache),
    ) as process:
        first = process.stdout.read(1) if process.stdout else b""
        seconds = time.perf_counter() - started
        process.kill()
    if not first:
        raise RequestError(f"{path} wrote nothing, so its start cannot be timed")
    return seconds


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RequestError(f"measuring memory failed: {last[0]:.300}")
    return done.stdout


def _environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports what this one does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | more


def _fill(about: dict[str, Any]) -> dict[str, int]:
    """Fill a context in this process and weigh it."""
    import cmr
    from cmr.ops import open_ops

    open_ops("cpu", 1).close()  # its modules belong to the process, not to the model
    idle, size = resident(), about["context"]
    model = cmr.open_model(about["path"], threads=about["threads"], context=size)
    session = cmr.Session.open(model, about["plugins"])
    opened, memory = resident(), session.plan.memory
    prompt = [(17 * i) % model.n_vocab for i in range(size - 8)]
    seq = session.add(session.request(prompt, max_tokens=8, temp=0.0, ignore_eos=True))
    while session.step():
        pass
    if seq.error is not None:
        raise seq.error
    # The sequence holds its KV; weights that a plugin keeps in memory of its own are there once the session is.
    taken = resident()
    return {"bytes": taken, "idle": idle, "predicted": opened + memory.beyond_weights}


if __name__ == "__main__":
    print(json.dumps(_fill(json.loads(sys.argv[1]))))
