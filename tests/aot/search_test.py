import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from anyexperts_jax.aot import search as module
from anyexperts_jax.aot.bounds import Bounds
from anyexperts_jax.aot.search import candidates, meshes, search, search_json, search_table
from anyexperts_jax.aot.step import CompiledStep
from anyexperts_jax.aot.work import Work
from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.mesh import MESH_AXES
from anyexperts_jax.train.config import load_config


def config(*settings):
    return load_config("smoke", ["train.batch_size=16", "model.stack.execution.dispatch=exchange", *settings])


@pytest.fixture
def eight_chips(monkeypatch):
    """A ring of eight chips, described without a compiler."""
    kind = {"platform": "cpu", "device_kind": "TPU v5 lite", "process_index": 0}
    chips = [SimpleNamespace(id=i, coords=[i, 0, 0], **kind) for i in range(8)]
    monkeypatch.setattr(module, "slice_devices", lambda topology, slices: chips)

    def fake_mesh(sizes, devices):
        shape = sizes.sizes(len(devices))
        return SimpleNamespace(shape=shape, devices=SimpleNamespace(flat=devices), size=len(devices))

    monkeypatch.setattr(module, "make_mesh", fake_mesh)
    monkeypatch.setattr(module, "check_batch", lambda *_: None)
    monkeypatch.setattr(module, "state_bytes", lambda *_: 2**20)


def test_meshes_divide_the_dimensions_they_split():
    found = list(meshes(config(), 8))
    assert all(math.prod(mesh.sizes(8).values()) == 8 for mesh in found)
    assert {mesh.expert for mesh in found} == {1, 2, 4, 8}
    assert {mesh.tensor for mesh in found} == {1}  # one key/value head
    assert len(found) == len({tuple(getattr(mesh, axis) for axis in MESH_AXES) for mesh in found})
    assert {mesh.expert for mesh in meshes(config("model.stack.execution.dispatch=blocks"), 8)} == {1}


@pytest.mark.slow
def test_candidates_are_sorted_by_their_estimate(eight_chips):
    found = candidates(config(), "v5e:2x4", 1)
    estimates = [estimate for estimate, _ in found]
    assert estimates == sorted(estimates)
    assert {one.model.stack.remat for _, one in found} == set(module.REMATS)
    wide = {one.model.stack.remat: e for e, one in found if one.mesh.expert == 8}
    assert wide["exchanged"] < wide["full"]  # if the network is the bottleneck, sending rows once less costs less


def fake_step(bound, free):
    bounds, work = Bounds(bound, 0.0, 0.0, 0.0, (), 0.5), Work({}, {}, 0, 0, 0, 0, 0.0)
    return CompiledStep("v5e:2x4", 1, 8, {}, 1, {"all": round(100 * (1 - free))}, 100, (), work, bounds, 1.0)


def test_the_best_that_fit_come_first_and_no_more_are_compiled_than_asked(eight_chips, monkeypatch, capsys):
    steps = iter([fake_step(3.0, 0.2), fake_step(1.0, -0.1), None, fake_step(2.0, 0.5)])

    def compile_one(*_):
        step = next(steps)
        if step is None:
            raise UserError("out of memory")
        return step

    monkeypatch.setattr(module, "compile_step", compile_one)
    monkeypatch.setattr(module, "to_json", lambda step: {"free": step.free})
    said = []
    tried = search(config(), "v5e:2x4", 1, 4, said.append)
    assert [one.step and one.step.bounds.step for one in tried] == [2.0, 3.0, 1.0, None]
    assert len(said) == 5
    assert said[0].endswith("compiling 4")
    rows = search_table(tried, "v5e:2x4").rows
    assert [row[-1] for row in rows] == ["arithmetic", "arithmetic", "does not fit", "does not fit"]
    figures = json.loads(json.dumps(search_json(tried)))
    assert figures[-1]["refusal"] == "out of memory"
    assert figures[0]["mesh"]["expert"] >= 1


def test_a_limit_of_zero_is_refused():
    with pytest.raises(UserError, match="limit=0 must be >= 1"):
        search(config(), "v5e:2x4", 1, 0)


def test_a_batch_that_nothing_divides_leaves_no_mesh(eight_chips, monkeypatch):
    def refuse(*_):
        raise UserError("does not split")

    monkeypatch.setattr(module, "check_batch", refuse)
    with pytest.raises(UserError, match="no mesh of v5e:2x4 divides batch"):
        search(dataclasses.replace(config()), "v5e:2x4", 1, 2)


@pytest.mark.aot
@pytest.mark.usefixtures("schedules")
def test_a_search_compiles_what_it_ranks(tmp_path, capsys):
    settings = ["train.batch_size=8", 'data.domains=["nlp"]', "model.vision=none", "model.audio=none"]
    settings += ["data.encoding.max_patches=0", "data.encoding.max_frames=0"]
    settings += ["model.stack.execution.dispatch=exchange"]
    settings += [
        "model.stack.num_layers=1",
        "model.stack.num_dense_layers=0",
        "model.stack.execution.implementation=xla",
    ]
    changes = [argument for setting in settings for argument in ("--set", setting)]
    path = tmp_path / "search.json"
    command = ["compile", "smoke", "--topology", "v5e:2x2", "--search", "--limit", "2", *changes]
    assert cli.main([*command, "--json", str(path)]) == 0
    tried = json.loads(path.read_text())
    bounds = [one["step"]["bound"] for one in tried]
    assert bounds == sorted(bounds)
    assert len({(one["remat"], *one["mesh"].values()) for one in tried}) == 2
    for one in tried:
        sizes = {axis: one["mesh"][axis] for axis in MESH_AXES}
        assert one["step"]["mesh"] == sizes
        assert math.prod(sizes.values()) == one["step"]["devices"] == 4
        assert 0 < one["step"]["free"] < 1
        assert one["estimated_bound"] == pytest.approx(one["step"]["bound"], rel=0.5)
    said = capsys.readouterr()
    assert said.err.count("remat") == 3  # how many are possible, and each that is compiled
    assert "Compiled for v5e:2x2, by the bound on a step's time; nothing was run" in " ".join(said.out.split())
