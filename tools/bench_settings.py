"""The settings in which `make bench` measures plugins: one table; what is not in it is measured as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from cmr.profiles import Profile, read_profile

MODELS = Path(__file__).parents[1] / "models"

# Options of each run; {models} is the folder of models. A plugin that is not installed is left out, and so are those
# with none, which need a file of the user.
SETTINGS: dict[str, tuple[str, ...]] = {
    "attn-pages": ("top=8",),
    "attn-plan": (),
    "attn-window": ("window=256",),
    "early-exit": ("sure=0.7", "sure=0.9"),
    "kv-auto": (),
    "kv-evict": (
        "budget=256,policy=random",
        "budget=256,policy=recent",
        "budget=256,policy=snapkv",
        "budget=128,policy=snapkv",
    ),
    "kv-quant": ("bits=8", "bits=4"),
    "grammar": (),  # which needs one
    "kv-window": (),  # for models whose layers have windows
    "layer-stream": ("budget=50%",),
    "spec-draft": ("model={models}/nano-q8_0.gguf",),
}


def settings_of(names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a title and plugins as --plugin takes them: each plugin with its options, then the named profiles.

    A name that has options stays as it is.
    """
    for name in names:
        if name.startswith("profile "):
            yield name, tuple(_spelled(read_profile(name.removeprefix("profile "))))
            continue
        for options in SETTINGS.get(name, ("",)):
            text = f"{name}:{options.format(models=MODELS)}" if options else name
            yield text, (text,)


def _spelled(profile: Profile) -> Iterator[str]:
    for name, options in profile.plugins.items():
        yield name + (":" if options else "") + ",".join(f"{key}={value}" for key, value in options.items())
