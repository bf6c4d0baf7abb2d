"""Serve llama.cpp's low-level calls over JSON lines; for an interpreter that has llama_cpp, without cmr."""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from typing import Any

CHUNK = 512  # prompt tokens in a batch, llama-bench's n_ubatch
DRAWN = 1 << 14  # random tokens drawn in advance


def resident() -> int:
    """Return the bytes of memory beyond mapped files: private and shared anonymous pages."""
    with open("/proc/self/smaps_rollup") as file:
        rows = dict(line.split(":", 1) for line in file if "kB" in line)
    return 1024 * sum(int(rows[key].split()[0]) for key in ("Pss_Anon", "Pss_Shmem"))


class Llama:
    """A model, and a context that is made anew only when its sizes change; settings are llama.cpp's own."""

    def __init__(self, path: str, mapped: bool) -> None:
        import llama_cpp

        self.api, self.idle = llama_cpp, resident() if os.path.exists("/proc/self/smaps_rollup") else 0
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = mapped
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise ValueError(f"cannot load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.tokens = (ctypes.c_int32 * DRAWN)(*(random.randrange(self.vocab) for _ in range(DRAWN)))
        self.context: Any = None
        self.sizes = (0, 0)
        self.depth = 0

    def prepare(self, case: dict[str, Any]) -> None:
        """Make or keep the context, bring every sequence to the depth, run each kind of step once."""
        parallel, sizes = case["parallel"], (case["context"], case["parallel"])
        if sizes != self.sizes:
            self.make(*sizes)
        self.api.llama_set_n_threads(self.context, case["threads"], case["threads"])
        self.rewind(parallel, min(self.depth, case["depth"]))
        for seq in range(parallel):
            self.prompt(seq, self.depth, case["depth"] - self.depth)
        self.depth = case["depth"]
        few = {**case, "n_prompt": min(case["n_prompt"], 2 * CHUNK), "n_gen": min(case["n_gen"], 2)}
        for _ in range(2):
            self.run(few)
            self.rewind(parallel, self.depth)

    def make(self, context: int, parallel: int) -> None:
        """Make a context for so many sequences of so many tokens."""
        if self.context:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx = -(-context // 256) * 256 * parallel
        params.n_seq_max = parallel
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"cannot make a context of {context} tokens for {parallel} sequences")
        self.memory = self.api.llama_get_memory(self.context)
        self.together = self.batch([(seq, 0) for seq in range(parallel)])
        self.sizes, self.depth = (context, parallel), 0

    def measure(self, case: dict[str, Any]) -> dict[str, float]:
        """Run the case so many times, going back to the depth each time; the seconds of one."""
        cpu, seconds = time.process_time(), 0.0
        for _ in range(case["repeats"]):
            started = time.perf_counter()
            self.run(case)
            seconds += time.perf_counter() - started
            self.rewind(case["parallel"], self.depth)
        return {"seconds": seconds / case["repeats"], "cpu": time.process_time() - cpu}

    def run(self, case: dict[str, Any]) -> None:
        """Feed the prompts, then one token of every sequence a step."""
        parallel = case["parallel"]
        for seq in range(parallel):
            self.prompt(seq, self.depth, case["n_prompt"])
        for step in range(case["n_gen"]):
            at = self.depth + case["n_prompt"] + step
            for row in range(parallel):
                self.together.token[row], self.together.pos[row] = self.tokens[(at + row) % DRAWN], at
            self.decode(self.together)

    def prompt(self, seq: int, start: int, count: int) -> None:
        """Feed random tokens of one sequence; only the last one's logits are computed."""
        for first in range(start, start + count, CHUNK):
            rows = min(CHUNK, start + count - first)
            if seq:
                batch = self.batch([(seq, at) for at in range(first, first + rows)])
                self.decode(batch)
                self.api.llama_batch_free(batch)
            else:  # the call that llama-bench uses, which takes positions from the memory
                self.decode(self.api.llama_batch_get_one(self.tokens, rows))

    def batch(self, rows: list[tuple[int, int]]) -> Any:
        """Make a batch of (sequence, position) rows, each with logits."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (seq, at) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = self.tokens[i], at, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        return batch

    def decode(self, batch: Any) -> None:
        """Run a batch and wait for it."""
        if self.api.llama_decode(self.context, batch):
            raise ValueError("llama_decode failed")
        self.api.llama_synchronize(self.context)

    def rewind(self, parallel: int, depth: int) -> None:
        """Forget what lies beyond the depth."""
        for seq in range(parallel):
            self.api.llama_memory_seq_rm(self.memory, seq, depth, -1)
        self.depth = depth

    def logits(self, tokens: list[int], file: str) -> None:
        """Read tokens from an empty context and write the logits after each to a file, as float32."""
        if self.sizes[0] < len(tokens):
            self.make(len(tokens), 1)
        self.rewind(self.sizes[1], 0)
        with open(file, "wb") as out:
            for first in range(0, len(tokens), CHUNK):
                part = tokens[first : first + CHUNK]
                batch = self.batch([(0, first + i) for i in range(len(part))])
                for i, token in enumerate(part):
                    batch.token[i] = token
                self.decode(batch)
                size = 4 * self.vocab * len(part)
                out.write(ctypes.string_at(self.api.llama_get_logits(self.context), size))
                self.api.llama_batch_free(batch)

    def memory_used(self, context: int, threads: int) -> dict[str, int]:
        """Fill a context with a prompt and say what memory that takes beyond the file, and before loading."""
        case = {"parallel": 1, "context": context, "threads": threads, "depth": 0}
        self.prepare({**case, "n_prompt": context - 2, "n_gen": 2})
        self.run({**case, "n_prompt": context - 2, "n_gen": 2})
        return {"bytes": resident(), "idle": self.idle}


def serve(lines: Any, answers: Any) -> None:
    """Answer requests until the input ends."""
    llama: Llama | None = None
    for line in lines:
        request = json.loads(line)
        what = request.pop("do")
        try:
            if what == "open":
                llama = Llama(request["path"], request["mapped"])
                answer: dict[str, Any] = {"version": llama.version}
            elif llama is None:
                raise ValueError("no model is open")
            elif what == "memory":
                answer = llama.memory_used(request["context"], request["threads"])
            elif what == "logits":
                llama.logits(request["tokens"], request["file"])
                answer = {}
            else:
                answer = {"prepare": llama.prepare, "measure": llama.measure}[what](request) or {}
        except Exception as error:
            answer = {"problem": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Keep stdout for answers; what llama.cpp prints goes nowhere."""
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
