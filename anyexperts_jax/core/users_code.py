"""Runs a user's code inside ours: whatever it raises becomes one line that says where."""

import importlib
import os
import sysconfig
import traceback
from types import ModuleType, TracebackType

from anyexperts_jax.core.errors import UserError, one_line

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class UsersCode:
    """A context in which every exception becomes a `UserError` with the user's file and line.

    It is a context manager because user code may raise any exception, also of its own types, or call `sys.exit`. Only
    an interrupt from the keyboard passes through.

    Args:
      what: the beginning of the message: "plugin 'my_experts' fails".
      module: the module that runs. Frames of its package count as the user's, wherever it is installed.
    """

    def __init__(self, what: str, module: str) -> None:
        self._what, self._package = what, module.partition(".")[0]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not isinstance(error, Exception | SystemExit):
            return
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_message(error)}"
        raise UserError(f"{self._what} at {self._where(error, trace)}: {one_line(said)}") from error

    def _where(self, error: BaseException, trace: TracebackType | None) -> str:
        """FILE:LINE of the innermost frame in the user's code, or of the innermost frame if there is none."""
        if isinstance(error, SyntaxError) and error.filename is not None:  # no frame: the file never ran
            return f"{error.filename}:{error.lineno}"
        found = ""
        for frame, line in traceback.walk_tb(trace):
            file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__", ""))
            if module.partition(".")[0] == self._package or not _is_library(file):
                found = f"{file}:{line}"
        return found or "an unknown line"


def import_users(module: str, what: str) -> ModuleType:
    """Imports a user's module; if that fails, `what` begins the message: "plugin 'my_experts' fails".

    Raises:
      ModuleNotFoundError: if there is no such module.
      UserError: if the module raised an exception; the message has its file, its line and the exception.
    """
    with UsersCode(what, module):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module exists, but imports one that does not
            missing = error
    raise missing


def _message(error: BaseException) -> str:
    return error.msg if isinstance(error, SyntaxError) else str(error)


def _is_library(file: str) -> bool:
    """Whether a file belongs to Python, to an installed package or to this one."""
    paths = sysconfig.get_paths()
    folders = (_OURS, *(os.path.abspath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
    return file.startswith("<") or os.path.abspath(file).startswith(tuple(folder + os.sep for folder in folders))
