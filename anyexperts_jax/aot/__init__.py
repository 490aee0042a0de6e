"""Compiling for accelerators that are not here, and reading what the compiler made.

gpu            kernels for an H100: registers, spills, shared memory, tensor cores
gpu_kernels    the kernels and the shapes that are compiled
targets/       what XLA has to know of a device to compile for it

Every figure is static, read from compiler output. None is a run time.
"""
