"""What a run keeps of the published checkpoint that it starts from: everything but the weights.

With it the run's own weights are a published model again, wherever the checkpoint went.
"""

import pathlib
import shutil

from anyexperts_jax.pretrained.extension import SETTINGS, TENSORS
from anyexperts_jax.pretrained.load import open_checkpoint
from anyexperts_jax.pretrained.write import write_beside


def keep_base(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes config.json, tokenizer and chat template of a checkpoint, and the settings of attached slots or of split
    networks, into a new folder, which appears whole or not at all.

    Raises:
      UserError: when the checkpoint cannot be read.
      OSError: when the folder cannot be written.
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
