"""`cmr eval FILE`: what a model and its plugins are worth: perplexity, divergence, at depth, small tasks."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import cmr
from cmr.cli.options import Parser, numbers, whole
from cmr.cli.plotting import check_plot, draw, plot_option
from cmr.cli.progress import Progress, say
from cmr.errors import FileError, RequestError
from cmr.eval import report
from cmr.eval.baseline import BaselineWriter, SavedBaseline
from cmr.eval.chunks import Chunks
from cmr.eval.depth import divergence_at_depth
from cmr.eval.divergence import Divergence
from cmr.eval.hellaswag import choose, hellaswag, read_tasks
from cmr.eval.perplexity import Live, Perplexity, compare_text, log_probs
from cmr.eval.suites import suites
from cmr.model import Model, open_model
from cmr.plots.measured import cost_charts
from cmr.session import Session

TASKS = 400


def main(argv: Sequence[str]) -> int:
    """Measure and print tables or JSON on stdout; remarks and progress go to stderr."""
    args = _parser().parse(argv)
    _refuse(args)
    with ExitStack() as stack:
        evaluation = Evaluation(args, stack)
        results = evaluation.results()
    if args.output == "json":
        about = {
            "cmr": cmr.__version__,
            "model": args.model,
            "base": args.base,
            "base_model": args.base_model,
        }
        print(json.dumps({**about, "settings": results}, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(report.tables(results)))
    if args.plot:
        draw(cost_charts(results), args.plot)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="cmr eval", description=__doc__)
    parser.add_argument("model", metavar="FILE", help="a GGUF file")
    _measure_flags(parser.add_argument_group("what is measured").add_argument)
    _side_flags(parser.add_argument_group("of what, against what").add_argument)
    add = parser.add_argument_group("how").add_argument
    add("-t", "--threads", type=whole(1), metavar="N", help="threads")
    add(
        "--device", default="cpu", metavar="NAME", help="cpu (compiled), cuda, or portable (numpy only, slow)"
    )
    add("-o", "--output", choices=["md", "json"], default="md", help="form of the result")
    plot_option(add)
    return parser


def _measure_flags(add: Callable[..., Any]) -> None:
    add("-f", "--file", "--text", metavar="FILE", help="a text: perplexity, and divergence from the baseline")
    add(
        "-c", "--ctx-size", type=whole(4), default=512, metavar="N", help="tokens of a chunk; half are scored"
    )
    add("--chunks", type=whole(1), metavar="N", help="chunks of the text at most (default: all)")
    add(
        "--depth",
        type=numbers(1),
        metavar="N,...",
        help="instead of chunks: generated tokens at these depths",
    )
    add("--predict", type=whole(1), default=64, metavar="N", help="tokens of each stretch at a depth")
    add(
        "--stretches",
        type=whole(1),
        default=8,
        metavar="N",
        help="stretches of the text for each depth, at most",
    )
    add("--hellaswag", metavar="FILE", help="choose endings: llama.cpp's text format, or that as .bz2")
    add(
        "--tasks",
        "--hellaswag-tasks",
        type=whole(1),
        default=TASKS,
        metavar="N",
        help="HellaSwag tasks, drawn as llama.cpp does",
    )
    add("--suite", action="append", default=[], metavar="NAME,...",
        help="small tasks: recall, pairs, copy, arithmetic, json, list, count, or all")  # fmt: skip
    add("--count", type=whole(1), default=40, metavar="N", help="questions of each kind")
    add(
        "--distances",
        type=numbers(0),
        metavar="N,...",
        help="tokens between a fact and its question in recall",
    )


def _side_flags(add: Callable[..., Any]) -> None:
    add("--plugin", action="append", default=[], metavar="NAME[:KEY=VALUE,...]",
        help="attach a plugin; may be repeated")  # fmt: skip
    add("--each", action="append", default=[], metavar="PLUGINS",
        help="a list of plugins to measure by itself, as in --each '' --each 'kv-quant:bits=4'; repeat it")  # fmt: skip
    add("--base", metavar="PLUGINS", help="plugins of the baseline (default: none, if a plugin is measured)")
    add("--base-model", metavar="FILE", help="another file of the same vocabulary as the baseline")
    add("--kl-divergence-base", metavar="FILE", help="a saved baseline; it holds the text as well")
    add("--save-all-logits", metavar="FILE", help="save log-probabilities as a baseline, as llama.cpp does")


def _refuse(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before a file is opened."""
    check_plot(args.plot)
    saved, live = args.kl_divergence_base, args.base is not None or args.base_model
    if not (args.file or saved or args.hellaswag or args.suite):
        raise RequestError("nothing is to be measured; give a text with -f, --hellaswag FILE, or --suite all")
    if args.plugin and args.each:
        raise RequestError("--plugin and --each both name plugins; write them into --each")
    if saved and (args.file or live):
        raise RequestError("--kl-divergence-base holds text and baseline; leave -f and --base out")
    if (args.depth or args.save_all_logits or live) and not args.file:
        raise RequestError(
            "--depth, --base, --base-model and --save-all-logits need a text; give one with -f"
        )
    if args.save_all_logits and (args.depth or live or len(args.each) > 1):
        raise RequestError("--save-all-logits saves one run over the chunks of -f; leave the other flags out")


class Evaluation:
    """Everything that the flags ask for, on one model; what it opens is closed with `stack`."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self._args, self._stack = args, stack
        self._progress = stack.enter_context(Progress(f"opening {args.model}"))
        self._text = _read(args.file) if args.file else None
        self._tasks = choose(read_tasks(args.hellaswag), args.tasks) if args.hellaswag else []
        need = max([args.ctx_size, *(depth + args.predict + 1 for depth in args.depth or ())])
        self._model = self._open(args.model, need if args.file else 0)
        self._base_model = self._open(args.base_model, need) if args.base_model else self._model
        _same_vocabulary(self._model, self._base_model)
        self._settings = [shlex.split(text) for text in args.each] or [args.plugin]

    def results(self) -> list[report.Result]:
        """Measure every setting of plugins and return its figures."""
        results: list[report.Result] = [
            {"name": " ".join(names) or "plain", "plugins": names} for names in self._settings
        ]
        sessions = [self._session(self._model, names) for names in self._settings]
        if self._args.depth:
            for result, names in zip(results, self._settings):
                result["depths"] = [report.as_json(row) for row in self._depths(names)]
        elif self._text is not None or self._args.kl_divergence_base:
            for result, found in zip(results, self._over_text(sessions)):
                result.update(found)
        for result, session in zip(results, sessions):
            result.update(self._tasks_of(session, result["name"]))
        return results

    def _over_text(self, sessions: list[Session]) -> Iterator[report.Result]:
        """Perplexity of each session, and divergence where there is a baseline."""
        args = self._args
        tell = self._tell("reading the text")
        if args.kl_divergence_base:
            base: Any = SavedBaseline(args.kl_divergence_base, self._model)
            decode = None
        else:
            chunks = Chunks.of(self._model, self._text or "", args.ctx_size, args.chunks)
            asked = args.base is not None or args.base_model
            if not asked and (args.save_all_logits or not any(self._settings)):
                yield from (self._perplexity(session, chunks, tell) for session in sessions)
                return
            first = self._session(self._base_model, shlex.split(args.base or ""))
            decode = any(session.plan.plugins for session in (first, *sessions))
            base = Live(first, chunks, decode)
        for pairs in compare_text(base, sessions, tell, decode):
            value = Perplexity.of([pair.log_prob for pair in pairs])
            yield {"perplexity": report.as_json(value), "divergence": report.as_json(Divergence.of(pairs))}

    def _perplexity(self, session: Session, chunks: Chunks, tell: Any) -> report.Result:
        path = self._args.save_all_logits
        with BaselineWriter(path, chunks, self._model.n_vocab) if path else nullcontext() as saved:
            keep = saved.write if saved else (lambda row: None)
            found = log_probs(session, chunks, tell, keep)
        return {"perplexity": report.as_json(Perplexity.of(found))}

    def _depths(self, names: list[str]) -> Iterator[Any]:
        args = self._args
        tokens = self._model.tokenizer.encode(self._text or "", bos=True)
        update = self._tell(f"{' '.join(names) or 'plain'} at depth {', '.join(map(str, args.depth))}")
        for place, depth in enumerate(args.depth):

            def tell(done: int, total: int, place: int = place) -> None:
                update(place * total + done, len(args.depth) * total)

            yield divergence_at_depth(
                self._model, names, tokens, depth, args.predict,
                base=shlex.split(args.base or ""), base_model=self._base_model, stretches=args.stretches, tell=tell,
            )  # fmt: skip

    def _tasks_of(self, session: Session, name: str) -> report.Result:
        """HellaSwag and the suites."""
        args, found = self._args, {}
        if self._tasks:
            found["hellaswag"] = report.as_json(
                hellaswag(session, self._tasks, self._tell(f"{name}: HellaSwag"))
            )
        if args.suite:
            names = [name for text in args.suite for name in text.split(",")]
            chosen = [] if "all" in names else names
            rows = suites(
                session, chosen, args.count, args.distances, tell=self._tell(f"{name}: small tasks")
            )
            found["suites"] = [report.as_json(row) for row in rows]
        return found

    def _open(self, path: str, need: int) -> Model:
        words = {"threads": self._args.threads, "device": self._args.device}
        model = open_model(path, **words)
        if need > model.config.n_ctx:
            say(
                f"cmr eval: {need} tokens are more than the {model.config.n_ctx} that {path} was trained with"
            )
            model.close()
            model = open_model(path, **words, context=need)
        self._stack.enter_context(closing(model))
        return model

    def _session(self, model: Model, plugins: list[str]) -> Session:
        return self._stack.enter_context(Session.open(model, plugins))

    def _tell(self, what: str) -> Callable[[int, int], None]:
        """Begin a new line of progress and return what moves it."""
        self._progress.begin(what)
        return self._progress.update


def _same_vocabulary(model: Model, other: Model) -> None:
    if other is not model and other.tokenizer.tokens != model.tokenizer.tokens:
        raise RequestError(
            f"{other.path} and {model.path} have different vocabularies, which cannot be compared"
        )


def _read(path: str) -> str:
    """A whole text, without the line break at its end, as llama.cpp reads it."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read().removesuffix("\n")
    except OSError as error:
        raise FileError(f"-f {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FileError(f"-f {path} is not UTF-8 text") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
