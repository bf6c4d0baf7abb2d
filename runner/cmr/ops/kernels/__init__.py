"""Kernels on integer addresses: vector code written by emitters, compiled by numba, kept on disk as machine code."""
