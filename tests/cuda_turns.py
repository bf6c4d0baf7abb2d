"""Numba's simulator of CUDA with another scheduler: the threads of a block take turns, which is faster than polling.

A thread runs until it meets the others or ends, then the next one does. Every other time they start from the last, so
that a read or write that must wait for another thread's is wrong in one of the two orders. `import` this module
before a kernel is launched; elsewhere than in the simulator that changes nothing.
"""

import sys
import threading
from itertools import count

import numpy as np
from numba import config

ROUNDS = count()


class Turn(threading.Thread):
    """A thread of the host that is one thread of a block after the other, as the simulator's own threads are."""

    def __init__(self):
        super().__init__(daemon=True)
        self.begin, self.back = threading.Lock(), threading.Lock()
        self.begin.acquire()
        self.back.acquire()
        self.error, self.waits = None, False
        self.start()

    def step(self, task=None):
        """Run a thread of a block, or let the present one go on; until it waits or ends."""
        if task is not None:
            self.task, self.blockIdx, self.threadIdx = task
        self.begin.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error

    def run(self):
        while True:
            self.begin.acquire()
            try:
                self.task()
            except BaseException as error:
                self.error = error
            self.waits = False
            self.back.release()

    def syncthreads(self):
        self.waits = True
        self.back.release()
        self.begin.acquire()


def run_block(turns, function, block, threads):
    """Run all threads of a block."""
    from numba.cuda.simulator.kernelapi import Dim3

    block, ended = Dim3(*block), 0
    waiting, points = [], [Dim3(*point) for point in np.ndindex(*threads)]
    for point in points if next(ROUNDS) % 2 else points[::-1]:
        turn = turns.pop() if turns else Turn()
        turn.step((function, block, point))
        (waiting if turn.waits else turns).append(turn)
    while waiting:
        ended = len(points) - len(waiting)
        assert not ended or ended == len(points), "some threads of a block ended where others wait for them"
        still = []
        for turn in waiting if next(ROUNDS) % 2 else waiting[::-1]:
            turn.step()
            (still if turn.waits else turns).append(turn)
        waiting = still


def install():
    """Let the simulator schedule threads in turns, and take shortcuts to arrays."""
    from numba.cuda.simulator import kernel, kernelapi
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    real, turns = sys.modules["numba.cuda"], []

    def bound(function, module):
        names = function.__globals__
        if names.get("cuda") is not None:
            names["cuda"] = module
        return function

    def call(self, *args):
        if self._device:
            return bound(self.fn, kernel._get_kernel_context())(*args)
        grid, block = kernel.normalize_kernel_dimensions(self.grid_dim, self.block_dim)
        module = kernelapi.FakeCUDAModule(grid, block, 0)
        args = [arg._ary if isinstance(arg, FakeCUDAArray) else arg for arg in args]
        assert not any(isinstance(arg, np.ndarray) and arg.ndim != 1 for arg in args)
        with kernel._push_kernel_context(module):
            function = bound(self.fn, module)
            for point in np.ndindex(*grid):
                module._shared = module.shared.__class__(0)
                run_block(turns, lambda: function(*args), point, block)

    def shared(self, shape, dtype):
        place = sys._getframe(1).f_lineno
        if place not in self._allocations:
            self._allocations[place] = np.full(shape, np.nan, np.float32)
        return self._allocations[place]

    assert real is not None
    kernel.FakeCUDAKernel.__call__ = call
    kernelapi.FakeCUDAShared.array = shared


if config.ENABLE_CUDASIM:
    import numba.cuda  # noqa: F401

    install()
