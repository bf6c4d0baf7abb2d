"""Measure `cmr serve`: clients at once against one after the other, what HTTP adds to a token, second turns, choices.

python tools/bench_server.py model.gguf [PART ...] [--clients 8] [--tokens 64] [--rounds 3] [-t 2], parts as below
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import numpy as np

import cmr

WAYS = (("whole", "as a whole answer"), ("stream", "as a stream"))
GREEDY = {"temperature": 0, "ignore_eos": True}


@contextmanager
def server(args: argparse.Namespace, *flags: str) -> Iterator[str]:
    """Start a server and give its host and port."""
    command = [sys.executable, "-m", "cmr.cli.main", "serve", args.model, "--port", "0", "-c", "1024", *flags]
    if args.threads:
        command += ["-t", str(args.threads)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.search(r"http://([\w.:]+)", line)
        if not found:
            raise SystemExit(line + process.stderr.read())
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


def ask(place: str, path: str, body: dict[str, Any]) -> tuple[str, float, float]:
    """Return the text of an answer, seconds to its first piece and to its end."""
    began, first, text = perf_counter(), 0.0, ""
    connection = http.client.HTTPConnection(place, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(answer.read().decode())
    if not body.get("stream"):
        text = _text(json.loads(answer.read()))
    for line in answer if body.get("stream") else ():
        if line.startswith(b"data: {"):
            piece = _text(json.loads(line[6:]))
            first = first or (perf_counter() - began if piece else 0.0)
            text += piece
    connection.close()
    return text, first, perf_counter() - began


def whole(place: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the object that answers a request which does not stream."""
    connection = http.client.HTTPConnection(place, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def _text(event: dict[str, Any]) -> str:
    (choice,) = event["choices"]
    said = choice.get("delta") or choice.get("message") or choice
    return said.get("content") or said.get("text") or ""


def together(args: argparse.Namespace) -> None:
    """Print tokens a second of clients at once and one after the other, prompts included, texts compared."""
    n_vocab, rng = cmr.open_tokenizer(args.model).n_vocab, np.random.default_rng(0)
    prompts = [rng.integers(10, n_vocab, args.prompt).tolist() for _ in range(args.clients)]
    bodies = [GREEDY | {"prompt": prompt, "max_tokens": args.tokens, "stream": True} for prompt in prompts]
    ratios = []
    with server(args, "-np", str(args.clients)) as place, ThreadPoolExecutor(args.clients) as clients:
        for turn in range(args.rounds + 1):
            began = perf_counter()
            alone = [ask(place, "/v1/completions", body)[0] for body in bodies]
            middle = perf_counter()
            at_once = list(clients.map(lambda body: ask(place, "/v1/completions", body), bodies))
            ended = perf_counter()
            if alone != [text for text, _, _ in at_once]:
                raise SystemExit("the texts differ")
            if turn:
                count = args.clients * args.tokens
                ratios.append((middle - began) / (ended - middle))
                print(
                    f"one after the other {count / (middle - began):.1f} tok/s, {args.clients} clients at once "
                    f"{count / (ended - middle):.1f}: {ratios[-1]:.2f} x",
                    flush=True,
                )
    print(f"least {min(ratios):.2f} x, median {statistics.median(ratios):.2f} x")


def overhead(args: argparse.Namespace) -> None:
    """Print microseconds a token of a session in a program, of whole answers and of streams, in turns."""
    body = GREEDY | {"prompt": "Once upon a time", "max_tokens": args.tokens}
    times: dict[str, list[float]] = {"session": [], "whole": [], "stream": []}
    with cmr.Session.open(cmr.open_model(args.model, threads=args.threads), ["batching"]) as session:
        with server(args) as place:
            for turn in range(args.rounds + 1):
                began = perf_counter()
                words = {"max_tokens": args.tokens, "temp": 0.0, "ignore_eos": True}
                text = "".join(session.text(body["prompt"], **words))
                seconds = {"session": perf_counter() - began}
                for name, stream in (("whole", False), ("stream", True)):
                    same, _, seconds[name] = ask(place, "/v1/completions", body | {"stream": stream})
                    if same != text:
                        raise SystemExit("the texts differ")
                for name in times if turn else ():
                    times[name].append(seconds[name] / args.tokens * 1e6)
    middle = {name: statistics.median(found) for name, found in times.items()}
    plain = middle["session"]
    served = [f"{middle[name]:.0f} {how} (+{middle[name] - plain:.0f})" for name, how in WAYS]
    print(f"{plain:.0f} us a token in a program, {' and '.join(served)}; medians of {args.rounds}")


def turns(args: argparse.Namespace) -> None:
    """Print seconds to the first piece of a second turn, without prefix-cache, with it, and with answers, in turns."""
    path, flags = "/v1/chat/completions", ("--chat-template", "chatml")
    ways = {"plain": (), "prefix-cache": ("--plugin", "prefix-cache")}
    ways["prefix-cache:answers"] = ("--plugin", "prefix-cache:answers")
    found: dict[str, list[float]] = {name: [] for name in ways}
    with ExitStack() as servers:
        places = {name: servers.enter_context(server(args, *flags, *more)) for name, more in ways.items()}
        for turn in range(args.rounds + 1):
            story = f"Story {turn}. " + "The fox went to the barn and saw a hen. " * 30
            texts = {}
            for name, place in places.items():
                talk = [{"role": "user", "content": story}]
                body = GREEDY | {"messages": talk, "max_tokens": args.tokens, "stream": True}
                said = ask(place, path, body)[0]
                talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
                texts[name], first, _ = ask(place, path, body)
                if turn:
                    found[name].append(first)
            if texts["plain"] != texts["prefix-cache"]:
                raise SystemExit("the texts differ")
    seconds = {name: statistics.median(times) for name, times in found.items()}
    told = [f"{name} {took:.3f} s ({seconds['plain'] / took:.1f} x)" for name, took in seconds.items()]
    print(f"second turn's first piece: {', '.join(told)}")


def choices(args: argparse.Namespace) -> None:
    """Print seconds of one request for four answers to a long prompt, and of four requests for one, in turns."""
    n, found = 4, {"together": [], "apart": []}
    body = GREEDY | {"max_tokens": args.tokens, "temperature": 1}
    with server(args, "-np", str(n)) as place, ThreadPoolExecutor(n) as clients:
        for turn in range(args.rounds + 1):
            prompt = f"Story {turn}. " + "The fox went to the barn and saw a hen. " * 30
            bodies = [body | {"prompt": prompt, "seed": 10 * turn + seed} for seed in range(n)]
            began = perf_counter()
            apart = list(clients.map(lambda one: ask(place, "/v1/completions", one)[0], bodies))
            middle = perf_counter()
            answer = whole(place, "/v1/completions", bodies[0] | {"n": n})
            ended = perf_counter()
            if apart != [choice["text"] for choice in answer["choices"]]:
                raise SystemExit("the texts differ")
            if turn:
                found["apart"].append(middle - began)
                found["together"].append(ended - middle)
    apart, together = (statistics.median(found[name]) for name in ("apart", "together"))
    print(
        f"{n} requests for one answer {apart:.2f} s, one request for {n} {together:.2f} s: {apart / together:.2f} x"
    )


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {"together": together, "overhead": overhead, "turns": turns, "choices": choices}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("parts", nargs="*", metavar="|".join(parts), default=list(parts))
    for flag, default in (("--clients", 8), ("--prompt", 32), ("--tokens", 64), ("--rounds", 3)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args()
    for name in args.parts:
        parts[name](args)


if __name__ == "__main__":
    main()
