"""Numba's simulator of CUDA with another scheduler: the threads of a block are generators that take turns.

The simulator starts a thread of the host for each thread of a block and polls them, which takes a fifth of a second
for a block. Here a kernel's source is compiled anew with `yield` where it calls syncthreads, and each thread of a
block runs up to there in turn; every other time they start from the last, so that a read or write that must wait for
another thread's is wrong in one of the two orders. Kernels run as late as they may, when the host waits for them, so
that what it reads too early is not there yet. Import this module before a kernel is launched; elsewhere than in the
simulator that changes nothing.
"""

import ast
import inspect
import sys
import textwrap
from itertools import count
from types import SimpleNamespace

import numpy as np
from numba import config, types

ROUNDS = count()
QUEUE = []
COMPILED = {}


class Thread:
    """What kernels call `cuda`, seen from the thread whose turn it is."""

    def __init__(self):
        self.threadIdx = self.blockIdx = None
        self.held = {}
        self.shared = SimpleNamespace(array=self._shared)
        self.local = SimpleNamespace(array=_array)
        self.const = SimpleNamespace(array_like=lambda values: values)

    def _shared(self, shape, dtype):
        place = sys._getframe(1).f_code, sys._getframe(1).f_lineno
        if place not in self.held:
            self.held[place] = _array(shape, dtype)
        return self.held[place]


def _array(shape, dtype):
    """Memory as it is before it is written: full of what must not be read."""
    made = np.empty(shape, dtype)
    made.view(np.uint8)[...] = 0xFF
    return made


THREAD = Thread()


def run_block(function, args, block, points):
    """Run all threads of a block up to where they wait for each other, and so on to the end."""
    THREAD.held, THREAD.blockIdx = {}, block
    threads = [(point, function(*args)) for point in points]
    while threads:
        waiting = []
        for point, thread in threads if next(ROUNDS) % 2 else threads[::-1]:
            THREAD.threadIdx = point
            for _ in thread:
                waiting.append((point, thread))
                break
        assert len(waiting) in (0, len(threads)), "some threads of a block end where others wait for them"
        threads = sorted(waiting, key=lambda pair: pair[0].x)


def compiled(function, generator):
    """A kernel or device function with numpy's types, calling others alike; as a generator where it waits."""
    if (function, generator) not in COMPILED:
        closure = inspect.getclosurevars(function)
        names = {**function.__globals__, **closure.nonlocals, "cuda": THREAD}
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        tree.body[0].decorator_list = []
        ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
        inner = {name: device.fn for name, device in names.items() if hasattr(device, "fn")}
        tree = ast.fix_missing_locations(Waits({name for name in inner if waits(inner[name])}).visit(tree))
        if generator:
            tree.body[0].body.append(ast.parse("if False: yield").body[0])
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {name: compiled(inner[name], False) for name in inner if name in used}
        names |= {
            name: getattr(np, value.name) for name, value in names.items() if isinstance(value, types.Number)
        }
        exec(compile(tree, function.__code__.co_filename, "exec"), names)
        COMPILED[function, generator] = names[function.__name__]
    return COMPILED[function, generator]


def waits(function):
    """Whether a device function waits for the other threads of a block."""
    return "syncthreads" in function.__code__.co_names


class Waits(ast.NodeTransformer):
    """Turns calls that wait into yields, and fma(a, b, c) into a * b + c, which rounds once more and is faster."""

    def __init__(self, waiting):
        self.waiting = waiting

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "syncthreads":
            return ast.Yield()
        if isinstance(node.func, ast.Attribute) and node.func.attr == "fma":
            return ast.BinOp(ast.BinOp(node.args[0], ast.Mult(), node.args[1]), ast.Add(), node.args[2])
        if isinstance(node.func, ast.Name) and node.func.id in self.waiting:
            return ast.YieldFrom(node)
        return node


def launch(self, *args):
    """Stand in for the simulator's launch of a kernel, which runs when the host waits for it and not before."""
    args = [arg._ary if isinstance(arg, FakeCUDAArray) else arg for arg in args]
    QUEUE.append((compiled(self.fn, True), args, self.grid_dim, self.block_dim))


def wait():
    """Run what has been launched."""
    while QUEUE:
        function, args, *dims = QUEUE.pop(0)
        grid, threads = ([*dim, 1, 1][:3] for dim in dims)
        points = [SimpleNamespace(x=x) for x in range(threads[0])]
        for x, y, z in np.ndindex(*grid):
            run_block(function, args, SimpleNamespace(x=x, y=y, z=z), points)


def copy_to_host(self):
    """Copy memory of the device when kernels have ended."""
    wait()
    return self._ary.copy()


if config.ENABLE_CUDASIM:
    from numba import cuda
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    FakeCUDAKernel.__call__, FakeCUDAArray.copy_to_host, cuda.synchronize = launch, copy_to_host, wait
