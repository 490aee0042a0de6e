"""Keeps, in a run, everything but the weights of the published checkpoint that it starts from.

With these files the run's weights can be exported as a published model, even after the checkpoint was moved or deleted.
"""

import pathlib
import shutil

from anyexperts_jax.pretrained.extension import SETTINGS, TENSORS
from anyexperts_jax.pretrained.load import open_checkpoint
from anyexperts_jax.pretrained.write import write_beside


def keep_base(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a checkpoint's config.json, tokenizer, chat template and settings of attached slots or split networks.

    They are written into a temporary folder that is renamed to `folder` when it is complete.

    Raises:
      UserError: if the checkpoint cannot be read.
      OSError: if the folder cannot be written.
    """
    found = open_checkpoint(checkpoint)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_beside(found.hub, found.path, found.plan().config.stack.param_dtype, fresh)
    for name in (SETTINGS, TENSORS):
        if (found.path / name).is_file():
            shutil.copyfile(found.path / name, fresh / name)
    fresh.rename(folder)
