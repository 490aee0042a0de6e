import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from anyexperts_jax.aot.collectives import DCN, KINDS, Collective, read_collectives
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh

MESH = MeshConfig(data=1, fsdp=2, expert=4)
SIZES = {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1, "sequence": 1}


def compiled_text(run, shape, spec):
    mesh = make_mesh(MESH)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(jnp.zeros(shape, jnp.float32)).compile().as_text()


def test_collectives_in_loops_are_multiplied_by_the_trip_count():
    """Five exchanges of [8, 3] float32 over `expert` in a loop, and one sum of [8, 3] over `fsdp` after it."""

    def run(x):
        def body(x, _):
            return lax.all_to_all(x, "expert", 0, 0, tiled=True) * 2, None

        x, _ = lax.scan(body, x, None, length=5)
        return lax.psum(x, "fsdp")

    found = read_collectives(compiled_text(run, (64, 3), P(("fsdp", "expert"))), SIZES)
    size = 8 * 3 * 4
    assert {(row.kind, row.axes): (row.count, row.bytes) for row in found} == {
        ("all-to-all", ("expert",)): (5, 5 * size),
        ("all-reduce", ("fsdp",)): (1, size),
    }


def test_a_loop_in_a_loop_and_a_sum_over_two_axes():
    def run(x):
        def outer(x, _):
            inner = lambda x, _: (lax.psum(x, ("fsdp", "expert")) / 8, None)  # noqa: E731
            return lax.scan(inner, x, None, length=3)[0] + 1, None

        return lax.scan(outer, x, None, length=4)[0]

    (found,) = read_collectives(compiled_text(run, (8, 3), P(("fsdp", "expert"))), SIZES)
    assert found == Collective("all-reduce", ("fsdp", "expert"), 12, 12 * 3 * 4)


def test_a_program_on_one_device_sends_nothing():
    text = jax.jit(lambda x: x @ x).lower(np.zeros((4, 4), np.float32)).compile().as_text()
    assert read_collectives(text, SIZES) == []


TPU_TEXT = """HloModule jit_step

%condition (state: (s32[])) -> pred[] {
  %state = (s32[]{:T(128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(20)
  ROOT %less = pred[]{:T(512)} compare(%state, %bound), direction=LT
}

%gather_start (p: bf16[2,8]) -> bf16[2,16] {
  ROOT %all-gather.1 = bf16[2,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a'}, frontend_attributes={chain_id="3"}
}

%gather_done (p: bf16[2,8]) -> bf16[2,16] {
  ROOT %all-gather.2 = bf16[2,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a'}, frontend_attributes={chain_id="3"}
}

%body (state: (s32[])) -> (s32[]) {
  %start = bf16[2,16]{1,0} fusion(%state), kind=kCustom, calls=%gather_start
  %done = bf16[2,16]{1,0} fusion(%start), kind=kCustom, calls=%gather_done
  %swap = bf16[4,16]{1,0} all-to-all(%done), channel_id=1, replica_groups=mesh['data'=1,'fsdp'=2,'expert'=4] {'expert'}, dimensions={0}
  %scatter = f32[2,2]{1,0} reduce-scatter(%done), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  ROOT %next = (s32[]) tuple(%state)
}

ENTRY %main (x: s32[]) -> (s32[]) {
  %x = s32[] parameter(0)
  ROOT %loop = (s32[]{:T(128)}) while(%x), condition=%condition, body=%body
}
"""  # noqa: E501, as libtpu writes it


def test_a_tpu_program_names_axes_and_writes_an_overlapped_collective_in_each_of_its_steps():
    found = {(row.kind, row.axes): (row.count, row.bytes) for row in read_collectives(TPU_TEXT, SIZES)}
    assert found == {
        ("all-gather", ("fsdp",)): (20, 20 * 2 * 16 * 2),
        ("all-to-all", ("expert",)): (20, 20 * 4 * 16 * 2),
        ("reduce-scatter", ("fsdp",)): (20, 20 * 2 * 2 * 2 * 4),  # what goes in: twice what comes out
    }


def test_a_sum_of_which_each_device_keeps_its_share_is_a_reduce_scatter():
    text = TPU_TEXT.replace("%gather_start", "%all-reduce-scatter.1").replace(
        "all-gather(%p), channel_id=7", "all-reduce(%p), channel_id=7"
    )
    rows = {(row.kind, row.axes): row for row in read_collectives(text, SIZES)}
    assert rows["reduce-scatter", ("fsdp",)].count == 20 + 20  # plus the one that is written as a reduce-scatter


def test_traffic_to_other_slices_goes_over_dcn():
    send = (
        "  %sent = (f32[3,5]{1,0}, u32[], token[]) send(%done, %after), channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    )
    rows = read_collectives(TPU_TEXT.replace("  %swap", send + "  %swap"), SIZES)
    assert Collective("all-reduce", (DCN,), 20, 20 * 3 * 5 * 4) in rows


def test_a_loop_of_unknown_length_is_an_error_where_it_sends():
    silent = TPU_TEXT.replace("constant(20)", "parameter(1)")
    silent = "\n".join(line for line in silent.splitlines() if not any(f" {kind}(" in line for kind in KINDS))
    assert read_collectives(silent, SIZES) == []
    with pytest.raises(UserError, match="cannot tell how often a loop runs"):
        read_collectives(TPU_TEXT.replace("constant(20)", "parameter(1)"), SIZES)
