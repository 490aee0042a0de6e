"""What `attach`, `split` and `upcycle` share: they read a checkpoint, change it and write it into a new folder."""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from anyexperts_jax.cli.options import add_checkpoint, add_command

if TYPE_CHECKING:
    from anyexperts_jax.pretrained.model import Pretrained


def convert(
    options: argparse.Namespace,
    change: "Callable[[Pretrained], Pretrained]",
    form: str = "hub",
    note: Callable[[str], None] = lambda line: None,
) -> "Pretrained":
    """Reads the checkpoint at `options.path`, changes it and writes it into `options.out`; returns the new model.

    Args:
      form: see `pretrained.write.export`.
      note: called with a line before the checkpoint is read.

    Raises:
      UserError: if `options.out` exists, which is checked before anything is read; or as for `change`.
    """
    from anyexperts_jax.pretrained.load import load_pretrained
    from anyexperts_jax.pretrained.write import export, require_new_folder

    require_new_folder(options.out)
    note(f"reading {options.path}")
    model = change(load_pretrained(options.path))
    export(model, options.out, form)
    return model


def add_conversion(
    commands: "argparse._SubParsersAction[Any]", name: str, text: str, examples: Sequence[str], *, out: str
) -> argparse.ArgumentParser:
    """Adds a command with the arguments `path` and `out`.

    Args:
      out: help text of `out`.
    """
    parser = add_command(commands, name, text, examples)
    add_checkpoint(parser)
    parser.add_argument("out", type=pathlib.Path, help=out)
    return parser
