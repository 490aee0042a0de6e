"""Ahead-of-time compilation for accelerators that are not attached, and analysis of the result. All figures are static.

topology     the devices of a TPU that is not attached, and the options that make the compiler dump its schedules
libtpu       checks that the TPU compiler is installed and fits JAX
report       cycles, matrix unit use, spills and VMEM of each kernel, from those schedules
kernels      the TPU kernels and the shapes they are compiled at
gpu          compiles a kernel for a GPU: registers, spills, shared memory, tensor cores
gpu_kernels  the GPU kernels and the shapes they are compiled at
step         compiles a configuration's train step for a pod: memory, collectives, work, bounds
collectives  the data that a compiled program sends between devices
network      the least time that takes, from the chips' links
work         what a step computes and moves, counted from its configuration
bounds       the least time of a step, and the largest MFU it can reach
fit          suggestions for a step that does not fit into memory
targets/     the descriptions of GPUs that XLA needs to compile for them
"""
