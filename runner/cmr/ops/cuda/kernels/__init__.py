"""Kernels for CUDA: what needs many threads at once, as functions that numba compiles for the device.

They use nothing that numba's simulator lacks, so that every one can be tried without a device: threads of a block
meet in shared memory, and no warp does anything by itself.
"""
