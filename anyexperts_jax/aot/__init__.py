"""Compiling for accelerators that are not here, and reading what the compiler made. Nothing here is a run time.

topology   devices of a TPU that is not attached, and the compiler told to write its schedules down
report     cycles, matrix unit use, spills and VMEM of each kernel, from those schedules
kernels    the expert kernels at the shapes they are studied at
"""
