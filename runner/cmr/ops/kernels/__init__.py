"""Compiled kernels on integer addresses; whoever imports one pays for numba."""
