"""The sampling flags: each fills the field of SamplerSettings with its name, whose default it shows."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from cmr.cli.options import real, whole
from cmr.errors import RequestError
from cmr.sampling import SAMPLERS, SamplerSettings, parse_logit_bias

# Field, flags, help; the field's type and default come from SamplerSettings, which checks ranges.
FLAGS = (
    ("temp", "--temp --temperature", "temperature; 0 or less takes the likeliest token"),
    ("top_k", "--top-k", "keep the N likeliest tokens; 0: all"),
    ("top_p", "--top-p", "keep the likeliest tokens that hold this probability together; 1: off"),
    ("min_p", "--min-p", "drop tokens under this share of the likeliest one's probability; 0: off"),
    ("typical_p", "--typical --typical-p", "locally typical sampling; 1: off"),
    (
        "top_n_sigma",
        "--top-nsigma --top-n-sigma",
        "keep logits this many deviations from the best; 0 or less: off",
    ),
    ("xtc_probability", "--xtc-probability", "how often XTC drops the likeliest choices; 0: off"),
    ("xtc_threshold", "--xtc-threshold", "probability from which XTC counts a choice; over 0.5: off"),
    ("repeat_penalty", "--repeat-penalty", "penalty on repeated tokens; 1: off"),
    ("repeat_last_n", "--repeat-last-n", "tokens that penalties look back at; 0: none, -1: all"),
    ("presence_penalty", "--presence-penalty", "penalty on tokens that occurred; 0: off"),
    ("frequency_penalty", "--frequency-penalty", "penalty on each time a token occurred; 0: off"),
    ("dry_multiplier", "--dry-multiplier", "strength of DRY, which stops repeated sequences; 0: off"),
    ("dry_base", "--dry-base", "base of DRY's growth with length"),
    ("dry_allowed_length", "--dry-allowed-length", "repetitions up to this length are free"),
    ("dry_penalty_last_n", "--dry-penalty-last-n", "tokens that DRY looks back at; 0: none, -1: all"),
    ("dynatemp_range", "--dynatemp-range", "how far the temperature moves from --temp with entropy; 0: off"),
    ("dynatemp_exponent", "--dynatemp-exp", "exponent of entropy in the dynamic temperature"),
    ("mirostat", "--mirostat", "0: off; 1 or 2: Mirostat, instead of the samplers that cut"),
    ("mirostat_ent", "--mirostat-ent", "Mirostat's target surprise, tau"),
    ("mirostat_lr", "--mirostat-lr", "Mirostat's learning rate, eta"),
)


def sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of SamplerSettings."""
    defaults = {field.name: field.default for field in dataclasses.fields(SamplerSettings)}
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-s", "--seed", type=whole(-1), metavar="N", help="-1, the default: a new one each run"
    )
    group.add_argument(
        "--samplers", metavar="NAMES", help=f"which run, and in which order (default: {';'.join(SAMPLERS)})"
    )
    for name, flags, text in FLAGS:
        integer = isinstance(defaults[name], int)
        group.add_argument(
            *flags.split(), dest=name, type=whole() if integer else real(), metavar="N" if integer else "X",
            help=f"{text} (default: {defaults[name]})",
        )  # fmt: skip
    group.add_argument(
        "--dry-sequence-breaker", action="append", metavar="TEXT",
        help="text that ends a repetition for DRY, in place of the usual ones; may be repeated; or none",
    )  # fmt: skip
    group.add_argument(
        "-l", "--logit-bias", type=parse_logit_bias, action="append", default=[], metavar="TOKEN+BIAS",
        help="make a token likelier or, with -, less likely; may be repeated",
    )  # fmt: skip


def answer_words(args: argparse.Namespace) -> dict[str, Any]:
    """Collect what the flags say about each answer; the rest is left to the profile and the defaults."""
    words = sampling_words(args)
    if args.predict is not None:
        words["max_tokens"] = args.predict
    if args.ignore_eos:
        words["ignore_eos"] = True
    return words


def sampling_words(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the fields of SamplerSettings that flags gave; RequestError where one would have no effect."""
    flags = {name: flag.split()[0] for name, flag, _ in FLAGS}
    words: dict[str, Any] = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    if args.seed is not None:
        words["seed"] = args.seed
    if args.logit_bias:
        words["logit_bias"] = dict(args.logit_bias)
    if args.samplers is not None:
        words["samplers"] = args.samplers
    if args.dry_sequence_breaker:
        words["dry_sequence_breakers"] = tuple(text for text in args.dry_sequence_breaker if text != "none")
    settings = SamplerSettings(**words)
    idle = [flags[name] for name in settings.idle() if name in words]
    if idle:
        why = "with Mirostat" if settings.mirostat else "without its sampler in --samplers"
        raise RequestError(f"{idle[0]} does nothing {why}; leave one of them out")
    return words
