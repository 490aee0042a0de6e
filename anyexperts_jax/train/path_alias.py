"""An alias for a directory whose name Orbax or TensorStore would misinterpret."""

import pathlib
import re
import tempfile

from anyexperts_jax.core.errors import require
from anyexperts_jax.train import processes

# Orbax finds the parts of a checkpoint with glob patterns that it appends to the path. Under "exp[lr=1e-3]" it finds
# none and writes an unreadable checkpoint; under "st*r" it may find a neighbour's. TensorStore takes a backslash for a
# separator.
_MISREAD = re.compile(r"[*?\[\]\\]")


class PathAlias:
    """`path` is the directory's own path if it is safe, else a link to it in a temporary folder.

    Raises:
      UserError: if a link is needed and the temporary folder has an unsafe name too, or there are several processes:
        Orbax broadcasts the first one's path to the others.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.path = directory.absolute()
        found = _MISREAD.search(str(self.path))
        if found is None:
            return
        character = f"{self.path}: a path with {found[0]!r} in it"
        require(not processes.several(), f"{character} works in one process alone; give the run another name")
        require(not _MISREAD.search(tempfile.gettempdir()), f"{character} needs a temporary folder without; set TMPDIR")
        self._folder = tempfile.TemporaryDirectory(prefix="anyexperts_")
        alias = pathlib.Path(self._folder.name) / "checkpoints"
        alias.symlink_to(self.path, target_is_directory=True)
        self.path = alias

    def close(self) -> None:
        """Removes the link, not its target."""
        if self._folder is not None:
            self._folder.cleanup()
