"""Options that several commands share."""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from anyexperts_jax.core.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a preset (tiny, small, smoke), a TOML file, or a run's config.json")
    add_set(parser, "override, as in optim.lr=1e-3; repeatable")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of yours that registers routers, dispatchers and the like; imported first, recorded; repeatable",
    )


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        nargs="+",
        metavar="AXIS=SIZE",
        help="devices to put the model on, as fsdp=4 expert=2, whatever it was trained on (default: the first device)",
    )


def mesh_of(options: argparse.Namespace) -> "Mesh | None":
    """The mesh that --mesh asks for, None where it is not given.

    Raises:
      UserError: an unknown axis, a size that is no number, or sizes that do not fit the devices.
    """
    if options.mesh is None:
        return None
    from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
    from anyexperts_jax.train.config import parse_override
    from anyexperts_jax.train.strict import build, merge

    sizes: dict[str, Any] = {}
    for text in options.mesh:
        sizes = merge(sizes, parse_override(text))
    try:
        return make_mesh(build(MeshConfig, sizes))
    except UserError as error:
        raise UserError(f"--mesh {' '.join(options.mesh)}: {error}") from error


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    add_mesh(parser)
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))
