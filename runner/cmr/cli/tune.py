"""`cmr tune FILE`: search a few exact settings for the fastest on your prompts, and write them as a profile."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmr.bench import tuned
from cmr.bench.measure import read_text
from cmr.bench.tuning import Mix, Setting, candidates, search
from cmr.cli import options
from cmr.cli.loading import load
from cmr.cli.progress import CompileNotice, Progress, say
from cmr.errors import CMRError, FileError, RequestError
from cmr.session import Session

# Where no prompts are given: a beginning, a question, and something to repeat with a change.
MIX = (
    "Once upon a time, in a village between two hills,",
    "Explain in a few sentences why the sky is blue during the day and red in the evening. Begin with what light is "
    "made of, then say what happens to it in the air, and close with the evening.",
    "Repeat the list, with plums in place of pears.\n- two pounds of apples from the market\n- one pound of pears "
    "from the market\n- three lemons from the garden\n- a loaf of bread from the baker\n\nThe list again:\n"
    "- two pounds of apples from the market\n-",
)


def main(argv: Sequence[str]) -> int:
    """Search, print what was measured, and write the profile if anything is better than noise."""
    args = _parser().parse(argv)
    options.settle_model(args, "cmr tune model.gguf")
    if args.kl is not None and not args.file:
        raise RequestError("--kl measures on a text; give one with -f FILE")
    output = Path(args.output or f"{Path(args.model).stem}.tuned.toml")
    texts = [*args.prompt, *map(read_text, args.file)]
    model: Any = load(args)
    try:
        prompts = _prompts(model, texts or MIX, args.predict)
        mix = Mix(model, prompts, args.predict, args.plugin, args.batch_size)
        with Progress("measuring") as progress:
            model.ops.compiling = CompileNotice(progress)
            settings = _possible(mix, [*candidates(model, args.plugin), *_inexact(model, args)])
            mix(Setting())  # which compiles what there is to compile, and notes the tokens
            outcome = search(settings, mix, args.seconds, progress.begin)
        print("\n".join([*tuned.table(outcome), "", tuned.verdict(outcome)]))
        if outcome.winner is not None:
            limits = mix.limits | dict(outcome.winner.setting.limits)
            _write(output, tuned.profile(outcome, model.path.name, limits, args.plugin))
        return 0
    finally:
        model.close()


def _parser() -> options.Parser:
    made = options.Parser(prog="cmr tune", usage="cmr tune FILE [flags]", description=__doc__)
    options.model_options(made)
    made.set_defaults(profile=None)
    add = made.add_argument_group("search").add_argument
    add(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt of yours; may be repeated",
    )
    add(
        "-f",
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt from a file; may be repeated",
    )
    add("-n", "--predict", type=options.whole(1), default=32, metavar="N", help="tokens of each answer")
    add(
        "-b",
        "--batch-size",
        type=options.whole(1),
        default=512,
        metavar="N",
        help="prompt tokens in one step, to begin with",
    )
    add("--seconds", type=options.real(0), default=60.0, metavar="S",
        help="about how long to measure; large models take longer: five rounds of the last are the least")  # fmt: skip
    add("--plugin", action="append", default=[], metavar="NAME[:KEY=VALUE,...]",
        help="attach a plugin to all runs; may be repeated")  # fmt: skip
    add("--kl", type=options.real(0), metavar="X",
        help="try keys and values in the fewest bits under a KL of X on -f's text, too: changes tokens")  # fmt: skip
    add("-o", "--output", metavar="FILE", help="where the profile goes (default: MODEL.tuned.toml, here)")
    return made


def _prompts(model: Any, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """The prompts as token ids, cut where they would leave no room for their answers."""
    room = model.config.n_ctx - tokens
    if room < 1:
        raise RequestError(f"answers of {tokens} tokens leave no room in a context of {model.config.n_ctx}")
    found = [model.tokenizer.encode(text, special=True, bos=True)[:room] for text in texts]
    if not all(found):
        raise RequestError("a prompt is empty; write a word")
    return found


def _possible(mix: Mix, settings: Sequence[Setting]) -> list[Setting]:
    """Those of the settings that this model and the plugins beside them can have."""
    mix.open(Setting()).close()  # what is wrong with the plain plan is the user's to know
    found = []
    for setting in settings:
        try:
            mix.open(setting).close()
        except CMRError as error:
            say(f"cmr tune: without {setting}: {error}")
        else:
            found.append(setting)
    return found


def _inexact(model: Any, args: argparse.Namespace) -> list[Setting]:
    """The cheapest keys and values under a bound on KL, as the plugin kv-auto finds them, if there are any."""
    if args.kl is None:
        return []
    with Session.open(model, [("kv-auto", {"text": args.file[0], "kl": args.kl})]) as session:
        chosen = session.plan.plugins["kv-auto"].settled
    return [Setting(plugins=(name,)) for name in chosen if name != "f16"]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise FileError(f"-o {path} cannot be written: {error.strerror}") from None
    print(f"written to {path}: cmr-run FILE --profile {path}")
