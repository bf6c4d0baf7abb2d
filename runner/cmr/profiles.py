"""Profiles: plugins with their options, and options of runs, in TOML files; some come with the official plugins."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from cmr.errors import PluginError
from cmr.options import hint

HOME = "cmr_plugins", "profiles"  # the package and the folder of those that have names


@dataclass(frozen=True)
class Profile:
    """Plugins with their options, and run options, as a TOML file states them."""

    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def named_profiles() -> dict[str, str]:
    """Return the profiles that can be named, each with the sentence at its head."""
    files = {
        file.name.removesuffix(".toml"): file for file in _home().iterdir() if file.name.endswith(".toml")
    }
    return {name: files[name].read_text("utf-8").partition("\n")[0].lstrip("# ") for name in sorted(files)}


def read_profile(path: str | Path) -> Profile:
    """Read a profile, a TOML file or the name of one of named_profiles().

    [plugins.NAME] are tables, above them are run options in the command line's words. PluginError for what is no
    profile.
    """
    content = _tables(path)
    plugins = content.pop("plugins", {})
    tables = isinstance(plugins, dict) and all(isinstance(options, dict) for options in plugins.values())
    if not tables:
        raise PluginError(
            f"profile {path}: plugins are tables, as in [plugins.kv-quant] with bits = 4 below it"
        )
    wrong = [key for key, value in content.items() if isinstance(value, dict)]
    if wrong:
        raise PluginError(f"profile {path} has a table [{wrong[0]}]; there are: run options, [plugins.NAME]")
    return Profile(plugins, {key.replace("-", "_"): value for key, value in content.items()})


def _tables(path: str | Path) -> dict[str, Any]:
    file: Any = Path(path)
    if not file.suffix and not file.exists():
        file = _home() / f"{path}.toml"
        if not file.is_file():
            names = named_profiles()
            raise PluginError(f"there is no profile {str(path)!r}{hint(str(path), names)}")
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise PluginError(f"profile {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PluginError(f"profile {path} is not TOML: {error}") from None


def _home() -> Any:
    package, folder = HOME
    return resources.files(package) / folder
