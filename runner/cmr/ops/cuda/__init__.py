"""The op table for CUDA devices, written with numba: imported only when that device is asked for."""
