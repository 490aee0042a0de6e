"""TPU kernels in interpret mode: memory starts as NaN, reads past an array give NaN, races are found."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, TpuSizes
from anyexperts_jax.ops.expert_mlp.vjp_tpu import TpuOptions
from tests.ops.expert_mlp.cases import BLOCK

STRICT = {"detect_races": True, "uninitialized_memory": "nan", "out_of_bounds_reads": "uninitialized"}


def options(*, columns=None, weight_columns=None, slab=16, block=BLOCK, cores=1):
    rows = KernelSizes(block, slab, 8, columns)
    sizes = TpuSizes(rows, rows, KernelSizes(block, slab, 8, weight_columns), cores, 2**20)
    return TpuOptions(sizes=sizes, interpret=pltpu.InterpretParams(num_cores_or_threads=cores, **STRICT))


def check_races():
    races = interpret_pallas_call.races
    assert races is None or not races.races_found
