"""llama.cpp as a contender: through llama-cpp-python in an interpreter of its own, or its llama-bench."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, cast

from cmr.bench.cases import Case
from cmr.bench.quiet import Sample
from cmr.errors import RequestError

WORKER = Path(__file__).with_name("llama_worker.py")
PYTHON, BENCH = "CMR_PEER_PYTHON", "CMR_PEER_BENCH"


class Peer(Protocol):
    """What a llama.cpp can be asked; `version` names it and `threads` may change between cases."""

    name: str
    version: str

    def prepare(self, case: Case) -> None: ...
    def measure(self, case: Case, repeats: int) -> Sample: ...
    def close(self) -> None: ...


def open_peer(
    path: str | os.PathLike[str],
    context: int,
    python: str | None = None,
    bench: str | None = None,
    mapped: bool = True,
) -> Peer:
    """Find llama.cpp and open the file with it, `mapped` or not; `context` tokens are enough for each sequence.

    In this order: the interpreter given or named by CMR_PEER_PYTHON, the llama-bench given or named by
    CMR_PEER_BENCH, llama_cpp beside this package, llama-bench on the PATH. Raises RequestError for none.
    """
    python, bench = python or os.environ.get(PYTHON), bench or os.environ.get(BENCH)
    if python:
        return LlamaWorker(path, python, context, mapped)
    if bench:
        return LlamaBench(path, bench, mapped)
    if importlib.util.find_spec("llama_cpp"):
        return LlamaWorker(path, sys.executable, context, mapped)
    if found := shutil.which("llama-bench"):
        return LlamaBench(path, found, mapped)
    raise RequestError(
        "no llama.cpp was found: give --peer-python an interpreter that has llama-cpp-python, "
        f"or --peer-bench a llama-bench (or set {PYTHON} or {BENCH})"
    )


class LlamaWorker:
    """A process with the model loaded in llama_cpp, which answers one JSON line with another.

    Between two questions it waits for input, so it takes no processor time while others are measured.
    """

    name = "llama.cpp"

    def __init__(self, path: str | os.PathLike[str], python: str, context: int, mapped: bool = True) -> None:
        self.context = context
        try:
            self._process = subprocess.Popen(
                [python, "-u", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise RequestError(f"{python} cannot be run: {error.strerror}") from None
        self._questions, self._answers = (
            cast(IO[str], pipe) for pipe in (self._process.stdin, self._process.stdout)
        )
        try:
            self.version = self.ask("open", path=str(path), mapped=mapped)["version"]
        except BaseException:
            self.close()
            raise

    def prepare(self, case: Case) -> None:
        """Make a context for as many sequences, fill it to the depth, warm up."""
        self.ask("prepare", **vars(case), context=max(self.context, case.context))

    def measure(self, case: Case, repeats: int) -> Sample:
        """Run the case in the worker, timed there."""
        answer = self.ask("measure", repeats=repeats, **vars(case))
        return Sample(answer["seconds"], answer["cpu"])

    def ask(self, what: str, **about: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; raises RequestError with what went wrong there."""
        try:
            self._questions.write(json.dumps({"do": what, **about}) + "\n")
            self._questions.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RequestError(f"the process with llama.cpp ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "problem" in answer:
            raise RequestError(f"llama.cpp: {answer['problem']}")
        return answer

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._questions.close()
        self._process.wait()
        self._answers.close()


class LlamaBench:
    """The llama-bench program, started anew for each measurement; only what it times itself counts."""

    name = "llama.cpp"

    def __init__(self, path: str | os.PathLike[str], program: str, mapped: bool = True) -> None:
        self._path, self._program, self._mapped = str(path), program, mapped
        self.version = f"llama-bench {program}"

    def prepare(self, case: Case) -> None:
        """Check that the program can do the case; it warms up by itself."""
        if case.parallel > 1:
            raise RequestError(
                f"llama-bench cannot run {case.parallel} sequences together; use --peer-python"
            )

    def measure(self, case: Case, repeats: int) -> Sample:
        """Run the program for so many repetitions."""
        before = _children()
        row = self._run(case, repeats)
        seconds = row["avg_ns"] / 1e9
        self.version = f"llama.cpp {row.get('build_number', '?')} ({row.get('build_commit', '?')})"
        return Sample(seconds, _children() - before)

    def close(self) -> None:
        """Nothing is left running."""

    def _run(self, case: Case, repeats: int) -> dict[str, Any]:
        sizes = {"-p": case.n_prompt, "-n": case.n_gen, "-d": case.depth, "-t": case.threads, "-r": repeats}
        if case.n_prompt and case.n_gen:
            sizes |= {"-p": 0, "-n": 0, "-pg": f"{case.n_prompt},{case.n_gen}"}  # type: ignore[dict-item]
        if not self._mapped:
            sizes["-mmp"] = 0
        flags = [str(word) for pair in sizes.items() for word in pair]
        command = [self._program, "-m", self._path, "-o", "json", *flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except OSError as error:
            raise RequestError(f"{self._program} cannot be run: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            last = (error.stderr or "").strip().splitlines()[-1:] or ["it said nothing"]
            raise RequestError(
                f"{self._program} ended with status {error.returncode}: {last[0]:.200}"
            ) from None
        return json.loads(done.stdout)[0]


def _children() -> float:
    """The processor seconds of processes that this one has waited for."""
    used = os.times()
    return used.children_user + used.children_system
