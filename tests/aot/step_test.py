import json

import pytest

from anyexperts_jax import cli
from anyexperts_jax.aot.step import abstract_batch, compile_step
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.train.config import load_config

# Before libtpu is loaded, so that it also writes schedules for the tests that come after these.
needs_libtpu = pytest.mark.usefixtures("schedules")
EXCHANGE = ["mesh.data=-1", "mesh.expert=4", "model.stack.dispatch=exchange"]


def test_the_abstract_batch_is_what_the_pipeline_gives():
    config = load_config("smoke", [])
    batch = abstract_batch(config.data.encoding, 8, make_mesh(config.mesh))
    assert batch.tokens_BT.shape == (8, config.data.encoding.max_length)
    assert batch.patches_BPX.shape[1:] == (config.data.encoding.max_patches, config.data.encoding.patch_features)
    assert batch.domain_B.shape == (8,)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e", "v5e:4", "v5p:4x4", "v5e:axb", "h100:1x8"])
def test_a_topology_that_is_none_is_refused(name, capsys):
    assert cli.main(["compile", "smoke", "--topology", name]) == 2
    assert f"topology {name!r} is not of the form CHIP:SHAPE" in capsys.readouterr().err


@pytest.mark.aot
@needs_libtpu
def test_the_step_compiles_for_a_slice_and_exchanges_rows_over_the_expert_axis(tmp_path, capsys):
    settings = [argument for setting in EXCHANGE for argument in ("--set", setting)]
    path = tmp_path / "step.json"
    assert cli.main(["compile", "smoke", "--topology", "v5e:2x4", *settings, "--json", str(path)]) == 0
    step = json.loads(path.read_text())
    assert step["devices"] == 8
    assert step["mesh"] == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1, "sequence": 1}
    sent = {(row["kind"], *row["axes"]): row for row in step["collectives"]}
    # Two MoE layers; rows and ids there and rows back, and back through rows and rows' gradients.
    assert sent["all-to-all", "expert"]["count"] == 2 * 5
    assert ("all-reduce", "data", "expert") in sent
    assert 0 < step["free"] < 1
    assert "all-to-all" in capsys.readouterr().out


@pytest.mark.aot
@needs_libtpu
def test_batches_that_do_not_split_are_refused_before_compiling():
    with pytest.raises(UserError, match=r"train\.batch_size=8 does not split over 16 batch shards"):
        compile_step(load_config("smoke", EXCHANGE), "v5e:4x4")
