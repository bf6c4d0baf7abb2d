"""A program: compiles every kernel for CUDA, with no device at hand, and says what it takes of registers.

Arguments: the compute capability ("7.5"), a folder to work in, and the program ptxas, or nothing. Run by test_cuda.py.
"""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from numba import cuda
from numba.cuda import dispatcher

from cmr.ops.cuda.kernels import attention, products, prompts, reading, rows, storing
from cmr.ops.cuda.kernels.compiler import Kernel
from cmr.ops.pack import GROUPED, PACKED
from cmr.quants import FORMATS

CACHES = ("F16", "F32", *PACKED)
PRODUCTS = (products.gemv, products.gemm, products.embed)
ATTENTION = (attention.generated, prompts.prompt)


def every():
    """Yield all kernels; of pairs of types of keys and values those that are alike, and each with F16."""
    for module in (rows, storing, attention, reading):
        yield from (thing for thing in vars(module).values() if isinstance(thing, Kernel))
    yield from (make(layout.name) for layout in FORMATS.values() for make in PRODUCTS)
    yield from (rows.gate(act) for act in rows.ACTIVATIONS)
    yield from (storing.store(type) for type in CACHES)
    for make in ATTENTION:
        yield from (make(type, type) for type in CACHES)
        yield from (make(type, "F16") for type in (*GROUPED, *PACKED))
        yield from (make("F16", type) for type in PACKED)


def compiled(kernel, target):
    """The kernel as PTX."""
    ptx, _ = cuda.compile_ptx(kernel.function, kernel.signature, cc=target)
    assert f".target sm_{target[0]}{target[1]}" in ptx
    return ptx


def assembled(ptx, target, folder, ptxas):
    """What ptxas says of registers; an older one is told that the text is of its own version."""
    place = Path(folder) / "kernel.ptx"
    place.write_text(ptx)
    command = [
        ptxas,
        "-v",
        f"-arch=sm_{target[0]}{target[1]}",
        str(place),
        "-o",
        str(place.with_suffix(".cubin")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    supported = re.search(r"current version is '([\d.]+)'", done.stderr)
    if done.returncode and supported:
        return assembled(re.sub(r"\.version [\d.]+", f".version {supported[1]}", ptx), target, folder, ptxas)
    assert done.returncode == 0, done.stderr
    return done.stderr


def main(capability, folder, ptxas):
    target = tuple(map(int, capability.split(".")))
    # Functions of the device are compiled for the device at hand.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    try:
        cuda.compile_ptx(lambda: None, (), cc=target)
    except Exception as error:
        print("no NVVM:", error)
        return
    kernels, most = list(every()), 0
    for kernel in kernels:
        ptx = compiled(kernel, target)
        if ptxas:
            said = assembled(ptx, target, folder, ptxas)
            assert "0 bytes spill stores, 0 bytes spill loads" in said, (kernel.name, said)
            most = max(most, *map(int, re.findall(r"Used (\d+) registers", said)))
    print(f"{len(kernels)} kernels, {most} registers at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
