"""The flags of `cmr-run`, spelled as llama.cpp's users type them, and what they become."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cmr.errors import RequestError

# Flags for a grammar, what they take, and how the plugin `grammar` is told that.
GRAMMARS = (
    ("--grammar", "GBNF", "gbnf={}", ""),
    ("--grammar-file", "FILE", "file={},kind=gbnf", ""),
    ("-j --json-schema", "SCHEMA", "json_schema={}", "; {} allows any JSON"),
    ("-jf --json-schema-file", "FILE", "file={},kind=json_schema", ""),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, raised as RequestError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise RequestError(
            message.removeprefix("argument ").replace("expected one argument", "wants a value")
        )

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read the arguments; a value may begin with a dash, and an unknown flag gets a suggestion."""
        words = self._join_values(sys.argv[1:] if argv is None else argv)
        for word in filter(self._is_glued, words):
            self._refuse(word)
        args, unknown = self.parse_known_args(words)
        if unknown:
            self._refuse(unknown[0])
        return args

    def _refuse(self, word: str) -> NoReturn:
        word = word.partition("=")[0]
        kind = "option" if word.startswith("-") else "use for the word"
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        close = difflib.get_close_matches(word, flags, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"{self.prog} --help lists what there is"
        raise RequestError(f"there is no {kind} {word!r}; {hint}")

    def _is_glued(self, word: str) -> bool:
        """Whether argparse would take an unknown flag, as -np, for a known one and its value: -n with p."""
        flag = word.partition("=")[0]
        return (
            flag[:1] == "-"
            and len(flag) > 2
            and flag[1:3].isalpha()
            and flag not in self._option_string_actions
        )

    def _join_values(self, argv: Sequence[str]) -> list[str]:
        """Write `-p -x` as `-p=-x`, so that argparse takes a prompt that looks like a flag."""
        joined: list[str] = []
        rest = iter(argv)
        for word in rest:
            action = self._option_string_actions.get(word)
            if action is not None and action.nargs is None and (value := next(rest, None)) is not None:
                joined += [f"{word}={value}"] if value.startswith("-") and len(value) > 1 else [word, value]
            else:
                joined.append(word)
        return joined


class _Help(argparse.HelpFormatter):
    """Help with room for the flags; defaults that mean "off" or "automatic" are left out."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, False, True, argparse.SUPPRESS, [], {}):
            return action.help
        return f"{action.help} (default: {str(default).replace('%', '%%')})"


def whole(low: int | None = None) -> Callable[[str], int]:
    """Make a converter to int that refuses values under `low`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a whole number, got {text!r}") from None
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"wants {low} or more, got {value}")
        return value

    return convert


def real(low: float | None = None) -> Callable[[str], float]:
    """Make a converter to a finite float that refuses values under `low`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a number, got {text!r}") from None
        if not abs(value) < float("inf"):
            raise argparse.ArgumentTypeError(f"wants a finite number, got {text!r}")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"wants {low:g} or more, got {value:g}")
        return value

    return convert


def numbers(low: int | None = None) -> Callable[[str], list[int]]:
    """Make a converter to whole numbers separated by commas, each of at least `low`."""
    one = whole(low)
    return lambda text: [one(word) for word in text.split(",")]


def gpu_layers(text: str) -> int | None:
    """Read how many layers go on a GPU: a number, "all" (which is very many), or "auto" for no wish."""
    return None if text == "auto" else sys.maxsize if text == "all" else whole(0)(text)


def told(options: str) -> Callable[[str], dict[str, str]]:
    """Make a converter to a plugin's options, written as KEY={},KEY=VALUE, from a text that is not empty."""
    pairs = [pair.split("=") for pair in options.split(",")]

    def convert(text: str) -> dict[str, str]:
        if not text.strip():
            raise argparse.ArgumentTypeError("wants a text, got an empty one")
        return {key: text if value == "{}" else value for key, value in pairs}

    return convert


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"wants a JSON object, got {text!r}")
    return value


def override(text: str) -> tuple[str, Any]:
    """Read `KEY=TYPE:VALUE` with the types int, float, bool and str."""
    key, _, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    kinds: dict[str, Callable[[str], Any]] = {
        "int": int, "float": float, "str": str, "bool": {"true": True, "false": False}.__getitem__,
    }  # fmt: skip
    if not key or not colon or kind not in kinds:
        raise argparse.ArgumentTypeError(f"wants KEY=TYPE:VALUE with {', '.join(kinds)}, got {text!r}")
    try:
        return key, kinds[kind](value)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{value!r} is not of the type {kind}") from None


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides how a model is opened."""
    add = parser.add_argument_group("model").add_argument
    add("model", nargs="?", metavar="FILE", help="the GGUF file (the first part of a split one)")
    add("-m", "--model", dest="model_flag", metavar="FILE", help="the same, as a flag")
    add("-c", "--ctx-size", type=whole(0), default=0, metavar="N", help="context in tokens; 0: the model's")
    add("-t", "--threads", type=whole(1), metavar="N", help="threads to generate with")
    add(
        "-tb",
        "--threads-batch",
        type=whole(1),
        metavar="N",
        help="threads to read prompts with (default: -t)",
    )
    add(
        "--device", default="cpu", metavar="NAME", help="cpu (compiled), cuda, or portable (numpy only, slow)"
    )
    add("-ngl", "--gpu-layers", "--n-gpu-layers", type=gpu_layers, metavar="N",
        help="layers on a GPU: 0, or all with --device cuda; auto: as --device says")  # fmt: skip
    add("--mlock", action="store_true", help="keep the file's pages in memory")
    add("--no-mmap", action="store_true", help="read the file into memory instead of mapping it")
    add("--rope-scaling", choices=["none", "linear", "yarn"], help="how positions beyond training are scaled")
    add("--rope-scale", type=real(1e-6), metavar="X", help="the factor of --rope-scaling")
    add("--rope-freq-base", type=real(1e-6), metavar="X", help="the base of the rotary frequencies")
    add("--override-kv", type=override, action="append", default=[], metavar="KEY=TYPE:VALUE",
        help="replace a metadata value; may be repeated")  # fmt: skip


def prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add what goes in and how it comes out."""
    add = parser.add_argument_group("prompt and output").add_argument
    add(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="the text to continue, special tokens included, or a chat's first message",
    )
    add("-f", "--file", metavar="FILE", help="read the prompt from a file; piped input works too")
    add("-e", "--escape", action=argparse.BooleanOptionalAction, default=True,
        help=r"read \n, \t, \xHH and their like in -p, -sys and -r; the default")  # fmt: skip
    add("-r", "--reverse-prompt", action="append", default=[], metavar="TEXT",
        help="stop where the model writes this; may be repeated")  # fmt: skip
    add("--no-display-prompt", action="store_true", help="do not show the prompt (on stderr, on a terminal)")
    add("--verbose-prompt", action="store_true", help="show the prompt's tokens on stderr")
    add("--json", action="store_true", help="print one JSON object with text, tokens and figures")


def answer_options(parser: argparse.ArgumentParser) -> None:
    """Add how long an answer may be, and how prompts are read."""
    add = parser.add_argument_group("answers").add_argument
    add("-n", "--predict", "--n-predict", type=whole(-1), metavar="N",
        help="tokens to write at most; -1, the default: until it ends or the context is full")  # fmt: skip
    add("-b", "--batch-size", type=whole(1), metavar="N", help="prompt tokens in one step, at most")
    add("-ub", "--ubatch-size", type=whole(1), metavar="N", help="the same; the smaller one counts")
    add("--ignore-eos", action="store_true", help="go on where the model would end")


def chat_options(parser: argparse.ArgumentParser) -> None:
    """Add the chat's flags."""
    add = parser.add_argument_group("chat").add_argument
    add("-cnv", "-i", "--conversation", "--interactive", dest="chat", action="store_true",
        help="chat; the default on a terminal without a prompt, if the model has a template")  # fmt: skip
    add("-no-cnv", "--no-conversation", action="store_true", help="never chat")
    add("-st", "--single-turn", action="store_true", help="chat for one turn")
    add("-sys", "--system-prompt", metavar="TEXT", help="what the model is told before the first message")


def template_options(parser: argparse.ArgumentParser) -> None:
    """Add how a conversation is written as a prompt."""
    add = parser.add_argument_group("chat template").add_argument
    add("--chat-template", metavar="NAME|JINJA", help="use this template instead of the file's")
    add("--chat-template-file", metavar="FILE", help="read the template from a file")
    add("--chat-template-kwargs", type=json_object, default={}, metavar="JSON",
        help="variables for the template, as in '{\"enable_thinking\": false}'")  # fmt: skip


def plugin_options(parser: argparse.ArgumentParser) -> None:
    """Add plugins and their other spellings."""
    add = parser.add_argument_group("plugins").add_argument
    add("--plugin", action="append", default=[], metavar="NAME[:KEY=VALUE,...]",
        help="attach a plugin: by name, or ./file.py:Class; may be repeated")  # fmt: skip
    add(
        "--profile",
        metavar="NAME|FILE",
        help="plugins from a TOML file or a named set (see `cmr plugins`); the command line wins",
    )
    add("--explain", action="store_true", help="print the plan (who owns each seam, memory, speed) and stop")
    for flags, metavar, options, more in GRAMMARS:
        add(*flags.split(), dest="grammars", action="append", default=[], type=told(options), metavar=metavar,
            help=f"spelling of --plugin grammar:{options.format(metavar)}{more}")  # fmt: skip
    add("-ctk", "--cache-type-k", default="f16", metavar="TYPE", help="spelling of --plugin kv-quant:k=TYPE")
    add("-ctv", "--cache-type-v", default="f16", metavar="TYPE", help="spelling of --plugin kv-quant:v=TYPE")


def settle_model(args: argparse.Namespace, example: str) -> None:
    """Settle which file is meant, and refuse flags of the model that contradict each other."""
    if args.model and args.model_flag and args.model != args.model_flag:
        raise RequestError(f"two models were given, {args.model} and {args.model_flag}; choose one")
    args.model = args.model or args.model_flag
    if not args.model:
        raise RequestError(f"a model is needed, as in: {example}")
    if args.gpu_layers is not None and (args.gpu_layers > 0) != (args.device == "cuda"):
        raise RequestError(
            f"{_layers(args.gpu_layers)} contradicts --device {args.device}: all layers run on one device, "
            "on a GPU with --device cuda"
        )
    if args.rope_scale is not None and args.rope_scaling in (None, "none"):
        raise RequestError("--rope-scale needs --rope-scaling linear or yarn")


def refuse_unmet(args: argparse.Namespace) -> None:
    """Refuse what `cmr-run` knows and cannot honour, before a file is opened."""
    settle_model(args, 'cmr-run model.gguf -p "Once upon a time"')
    if args.no_conversation and (args.chat or args.single_turn or args.system_prompt):
        raise RequestError("--no-conversation contradicts the chat flags beside it")
    if len(args.grammars) > 1:
        raise RequestError(
            f"{len(args.grammars)} grammars were given; choose one of --grammar, -j and their files"
        )
    if args.prompt is not None and args.file is not None:
        raise RequestError("both -p and -f give a prompt; choose one")


def _layers(count: int) -> str:
    return f"-ngl {'all' if count == sys.maxsize else count}"
