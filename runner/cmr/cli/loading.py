"""From flags to an open model with its plugins attached."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from typing import Any

from cmr.chat import ChatTemplate, chat_template
from cmr.cli.progress import Progress, say
from cmr.discovery import available
from cmr.errors import FileError, PluginError, RequestError
from cmr.gguf_file import open_gguf
from cmr.model import Model, open_model
from cmr.profiles import read_profile
from cmr.session import Session
from cmr.stats import size


def load(args: argparse.Namespace) -> Model:
    """Open the model that the flags describe."""
    _settle_threads(args)
    with Progress(f"opening {args.model}"):
        model = open_model(
            args.model,
            threads=args.threads,
            prompt_threads=args.threads_batch,
            device=args.device,
            context=args.ctx_size or None,
            overrides=_overrides(args),
            mapped=not args.no_mmap,
        )
    if args.gpu_layers and args.gpu_layers < model.n_layers:
        model.close()
        raise RequestError(
            f"-ngl {args.gpu_layers} leaves some of the {model.n_layers} layers to the CPU, and all run on one device; "
            "try -ngl all"
        )
    trained = model.config.n_ctx_train
    if args.ctx_size > trained:
        say(f"-c {args.ctx_size} is more than the {trained} tokens that the model was trained with")
    if args.mlock:
        _lock(model)
    return model


def attach(args: argparse.Namespace, model: Model) -> Session:
    """Open a session with the plugins and limits that the flags name."""
    limits: dict[str, Any] = {
        name: count for name in ("threads", "threads_batch") if (count := getattr(args, name)) is not None
    }
    if args.batch_size or args.ubatch_size:
        limits["chunk"] = min(size for size in (args.batch_size, args.ubatch_size) if size)
    spelled = [*_kv_quant(args), *(("grammar", options) for options in args.grammars)]
    return Session.open(model, [*args.plugin, *spelled], args.profile, **limits)


def _settle_threads(args: argparse.Namespace) -> None:
    """Take the threads from the profile where no flag names them: a model is opened with them."""
    options = read_profile(args.profile).options if args.profile else {}
    for name in ("threads", "threads_batch"):
        count = options.get(name)
        if getattr(args, name) is None and isinstance(count, int):  # Session.open refuses what is no number
            setattr(args, name, count)


def find_template(args: argparse.Namespace, model: Any) -> ChatTemplate:
    """Return the template of the flags or of the file, with the spelling of its BOS and EOS tokens."""
    tokenizer = model.tokenizer
    bos, eos = (
        "" if token is None else tokenizer.piece(token).decode("utf-8", "replace")
        for token in (tokenizer.bos, tokenizer.eos)
    )
    if args.chat_template is not None:
        return chat_template(args.chat_template, model.metadata, bos, eos)
    if args.chat_template_file is not None:
        try:
            with open(args.chat_template_file, encoding="utf-8") as file:
                return ChatTemplate(file.read(), bos, eos)
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(
                f"--chat-template-file {args.chat_template_file} cannot be read: {error}"
            ) from None
    if model.chat_template is None:
        raise RequestError(f"{model.path} has no chat template; name one with --chat-template, as in chatml")
    return ChatTemplate(model.chat_template, bos, eos)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Metadata to replace: what --override-kv says, and the rotary flags under the model's own keys."""
    overrides = dict(args.override_kv)
    rope = {
        "scaling.type": args.rope_scaling,
        "scaling.factor": args.rope_scale,
        "freq_base": args.rope_freq_base,
    }
    given = {key: value for key, value in rope.items() if value is not None}
    if given:
        with open_gguf(args.model) as file:
            arch = file.metadata.get("general.architecture")
        overrides |= {f"{arch}.rope.{key}": value for key, value in given.items()}
    return overrides


def _kv_quant(args: argparse.Namespace) -> list[str]:
    """Spell -ctk and -ctv as the plugin that serves them; f16 is what is there without it."""
    k, v = args.cache_type_k.lower(), args.cache_type_v.lower()
    if k == v == "f16":
        return []
    if "kv-quant" not in available():
        flag, kind = ("-ctk", k) if k != "f16" else ("-ctv", v)
        raise PluginError(
            f"{flag} {kind} needs the plugin kv-quant, which is not installed; f16 works without it"
        )
    return [f"kv-quant:k={k},v={v}"]


def _lock(model: Model) -> None:
    """Pin the pages of the mapped files, so that they are never read from the disk again."""
    if os.name != "posix":
        raise RequestError(f"--mlock cannot be honoured on {sys.platform}; leave it out")
    libc = ctypes.CDLL(None, use_errno=True)
    for file in model.file.files:
        if libc.mlock(ctypes.c_void_p(file.address), ctypes.c_size_t(file.nbytes)):
            reason = os.strerror(ctypes.get_errno())
            raise RequestError(
                f"--mlock cannot keep {size(file.nbytes)} in memory: {reason}; "
                "raise the limit with ulimit -l, or leave it out"
            )
