"""Machine code of kernels on disk, and its way into memory: a kernel that is there runs without numba being imported.

The folder's name tells apart the kernels' sources, the versions of the compiler, and the processor. A file holds the
symbol, a checksum and the object code; one that is damaged is compiled again.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llvmlite import binding

from cmr import folders

HERE = Path(__file__).parent


# Symbols of numba's and Python's runtimes; code that calls them could not be loaded by itself.
FOREIGN = (b"NRT_", b"numba_", b"PyErr_", b"PyGILState_")
_LOADED: dict[Path, Kernel] = {}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled kernel: where it is, and whether it came from disk."""

    address: int
    cache_hits: int
    keep: Any = None


def cache_folder() -> Path:
    """Return where compiled kernels of these sources belong: below CMR_CACHE, else the user's cache, else temporary."""
    return (folders.cache_folder() or _temporary()) / f"kernels-{_fingerprint()}"


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"cmr-{os.getuid() if hasattr(os, 'getuid') else 0}"


def _fingerprint() -> str:
    """Twelve digits that change with any source in this folder, the compiler, the interpreter and the processor."""
    digest = hashlib.sha256()
    for source in sorted(HERE.glob("*.py")):
        digest.update(source.read_bytes())
    wishes = [os.environ.get(name) for name in ("CMR_CPU", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    features = sorted(name for name, there in binding.get_host_cpu_features().items() if there)
    facts = (version("numba"), version("llvmlite"), sys.version, sys.platform, wishes, features)
    digest.update(repr((*facts, binding.get_host_cpu_name())).encode())
    return digest.hexdigest()[:12]


@cache
def _folder() -> Path:
    """The folder in use, made now; a temporary one where the first choice cannot be written."""
    first, temporary = cache_folder(), _temporary()
    for folder in (first, temporary / first.name):
        try:
            if temporary in folder.parents:
                temporary.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and (temporary not in folder.parents or _private(temporary)):
            return folder
    return Path(tempfile.mkdtemp()) if temporary in first.parents else first


def _private(folder: Path) -> bool:
    """Whether nobody else can put files, which would be run as code, into a temporary folder."""
    if not hasattr(os, "getuid"):
        return True
    facts = folder.lstat()
    return facts.st_uid == os.getuid() and not facts.st_mode & 0o022


@cache
def _engine() -> Any:
    """The loader of object code, one for the process."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine)


def compile_kernel(key: str) -> Kernel:
    """Return the kernel with this key, from disk where it is there, else compiled by numba and stored."""
    from .emit import EMITTERS

    def compiled() -> Any:
        from .compiler import compile_native

        return compile_native(key)

    return stored(key.replace(":", "-"), inspect.getfile(EMITTERS[key.partition(":")[0]]), compiled)


def stored(name: str, source: str, compiled: Callable[[], Any]) -> Kernel:
    """Return machine code kept under a name, or make it with compiled(), which returns a C callback of numba's.

    What comes from a `source` outside this folder is told apart by that file's contents. Raises ImportError where
    numba is needed and missing.
    """
    path = _path(name, Path(source))
    if path not in _LOADED:
        _LOADED[path] = _load(path) or _make(path, compiled)
    return _LOADED[path]


def _load(path: Path) -> Kernel | None:
    """Bring a stored kernel into memory; None where there is none."""
    found = _read(path)
    if found is not None:
        symbol, code = found
        engine = _engine()
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        address = engine.get_function_address(symbol)
        return Kernel(address, 1) if address else None
    return None


def _make(path: Path, compiled: Callable[[], Any]) -> Kernel:
    callback = compiled()
    code = callback._library.serialize_using_object_code()[2][0]
    if not any(name in code for name in FOREIGN):
        _write(path, callback.native_name, code)
    return Kernel(callback.address, 0, callback)


def _path(name: str, source: Path) -> Path:
    stamp = "" if source.parent == HERE else "-" + hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    return _folder() / f"{name}{stamp}.kernel"


def _read(path: Path) -> tuple[str, bytes] | None:
    """The symbol and object code in a file, or None where it is absent or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, _, code = content.partition(b"\n")
    symbol, _, digest = head.decode("ascii", "replace").partition(" ")
    return (symbol, code) if digest == hashlib.sha256(code).hexdigest() else None


def _write(path: Path, symbol: str, code: bytes) -> None:
    """Store a kernel in one step, so that other processes see all of it or nothing; a full disk is no error."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(f"{symbol} {hashlib.sha256(code).hexdigest()}\n".encode() + code)
        os.replace(file.name, path)
    except OSError:
        return
