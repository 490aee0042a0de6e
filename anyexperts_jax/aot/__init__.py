"""Compiling for accelerators that are not here, and reading what the compiler made. Nothing here is a run time.

topology     devices of a TPU that is not attached, and the compiler told to write its schedules down
libtpu       whether the TPU compiler is there and fits JAX
report       cycles, matrix unit use, spills and VMEM of each kernel, from those schedules
kernels      the TPU kernels and the shapes they are compiled at
gpu          a kernel compiled for a GPU: registers, spills, shared memory, tensor cores
gpu_kernels  the GPU kernels and the shapes they are compiled at
step         a configuration's train step compiled for a pod: memory, collectives, work, bounds
collectives  what a compiled program sends between devices
network      the least time that takes, by the links of the chips
work         what a step computes and moves, counted from its configuration
bounds       the least time of a step and the most of the chip's peak that it can use
fit          what helps a step that does not fit
targets/     what XLA has to know of a GPU to compile for it
"""
