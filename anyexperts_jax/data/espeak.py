"""eSpeak NG as a pure function, from text, voice, rate and pitch to samples and the start of each word.

The library and its data come in the `espeakng-loader` wheel. By default an utterance depends on the ones before it: the
pitch flutter, the roughness and the noise of a voice continue from one to the next. So eSpeak gets its own data folder,
copied from the wheel, in which flutter and roughness are off in every voice variant, and its random seed is set before
each utterance. Variants with echo or breath keep other state and are refused.
"""

import ctypes
import dataclasses
import functools
import importlib
import itertools
import os
import pathlib
import shutil
import tempfile
import threading
import weakref
from typing import Any

import numpy as np
from jaxtyping import Int16
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require, require_one_of

ESPEAK_RATE = 22_050  # samples per second of what eSpeak returns
WORDS_PER_MINUTE = (80, 450)  # outside this range eSpeak changes the rate by other means or not at all

_DATA_FILES = ("en_dict", "intonations", "phondata", "phonindex", "phontab")
_ENGLISH = pathlib.Path("lang/gmw")
_VARIANTS = pathlib.Path("voices/!v")
_STEADY = b"\nflutter 0\nroughness 0\n"
_STATEFUL = (b"echo", b"breath", b"klatt")  # settings of variants that keep state between utterances

# Constants of speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_PARAMETER_RATE, _PARAMETER_VOLUME, _PARAMETER_PITCH = 1, 2, 3
_EVENT_LIST_TERMINATED, _EVENT_WORD = 0, 1
_VOLUME = 60  # below the default of 100, so that the stateful gain control never acts


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_LOCK = threading.Lock()  # the library has one voice, one callback and one output per process
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


@dataclasses.dataclass(frozen=True, eq=False)
class Utterance:
    samples: Int16[ndarray, " samples"]  # at ESPEAK_RATE
    word_starts: tuple[int, ...]  # the first sample of each word, in the order of the text


@dataclasses.dataclass(frozen=True, eq=False)
class _Engine:
    library: ctypes.CDLL
    data: pathlib.Path


def speak(text: str, voice: str, *, words_per_minute: int = 175, pitch: int = 50) -> Utterance:
    """Speaks `text` in `voice`, an accent and a variant such as "en-us+f1"; pitch is in [0, 100].

    The samples are integers that depend only on the arguments and the version of the library. Threads may call this;
    utterances are made one at a time.

    Raises:
      UserError: if eSpeak NG cannot be used (the message says what to install), there is no such voice, or a number is
        out of range.
    """
    low, high = WORDS_PER_MINUTE
    require(low <= words_per_minute <= high, f"words_per_minute={words_per_minute} must be in [{low}, {high}]")
    require(0 <= pitch <= 100, f"pitch={pitch} must be in [0, 100]")
    accent, _, variant = voice.partition("+")
    require(variant != "", f"voice={voice!r} must be an accent and a variant, such as en-us+f1")
    samples: list[bytes] = []
    word_starts: list[int] = []

    def receive(address: int | None, count: int, events: Any) -> int:
        if address and count > 0:
            samples.append(ctypes.string_at(address, 2 * count))
        listed = itertools.takewhile(lambda event: event.type != _EVENT_LIST_TERMINATED, events)
        word_starts.extend(event.sample for event in listed if event.type == _EVENT_WORD)
        return 0  # continue

    with _LOCK:
        engine = _engine()
        _require_variant(engine, variant)
        library = engine.library
        callback = _Callback(receive)  # keeps a reference during the call, since the library keeps only the address
        library.espeak_SetSynthCallback(callback)
        found = library.espeak_SetVoiceByName(voice.encode()) == 0
        require(found, f"voice={voice!r}: eSpeak NG has no English accent {accent!r}")
        _synthesise(library, text.encode(), words_per_minute, pitch)
    return Utterance(samples=np.frombuffer(b"".join(samples), dtype=np.int16), word_starts=tuple(word_starts))


def variants() -> tuple[str, ...]:
    """The voice variants that may follow the + of a voice, sorted."""
    with _LOCK:
        return _variants(_engine())


def version() -> str:
    with _LOCK:
        return _engine().library.espeak_Info(None).decode()


def _variants(engine: _Engine) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in (engine.data / _VARIANTS).iterdir()))


def _require_variant(engine: _Engine, variant: str) -> None:
    """Checks a variant, since eSpeak ignores an unknown one and speaks in its default voice."""
    if not (engine.data / _VARIANTS / variant).is_file():
        require_one_of("variant", variant, _variants(engine))


def _synthesise(library: ctypes.CDLL, text: bytes, words_per_minute: int, pitch: int) -> None:
    # text and its size; start, unit and end of the part to speak (0: all of it); flags; identifier and user data
    whole_text = (text, len(text) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
    statuses = {
        "SetRandSeed": library.espeak_ng_SetRandSeed(1),
        "SetParameter(rate)": library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0),
        "SetParameter(volume)": library.espeak_SetParameter(_PARAMETER_VOLUME, _VOLUME, 0),
        "SetParameter(pitch)": library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0),
        "Synth": library.espeak_Synth(*whole_text),
    }
    for call, status in statuses.items():
        require(status == 0, f"eSpeak NG's {call} failed with status {status}")


@functools.cache
def _engine() -> _Engine:
    """Returns the process's eSpeak NG, which the first call loads. The caller must hold the lock."""
    loader = _import_loader()
    library = _load_library(loader.get_library_path())
    folder = pathlib.Path(tempfile.mkdtemp(prefix="anyexperts-espeak-"))
    engine = _Engine(library, folder / "espeak-ng-data")
    weakref.finalize(engine, _remove_in_process, folder, os.getpid())
    _copy_steady_data(pathlib.Path(loader.get_data_path()), engine.data)
    rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, str(engine.data).encode(), _INITIALIZE_DONT_EXIT)
    require(rate == ESPEAK_RATE, f"eSpeak NG did not start (it returned {rate}); reinstall espeakng-loader")
    return engine


def _remove_in_process(folder: pathlib.Path, process: int) -> None:
    if os.getpid() == process:  # a forked child that exits must leave the folder to its parent
        shutil.rmtree(folder, ignore_errors=True)


def _import_loader() -> Any:
    try:
        return importlib.import_module("espeakng_loader")
    except ImportError as error:
        raise UserError("speech needs eSpeak NG; install it with: pip install espeakng-loader") from error


def _load_library(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise UserError(f"eSpeak NG's library {path} cannot be loaded ({error}); reinstall espeakng-loader") from error
    require(hasattr(library, "espeak_ng_SetRandSeed"), f"{path} is older than eSpeak NG 1.52; upgrade espeakng-loader")
    library.espeak_Info.restype = ctypes.c_char_p
    library.espeak_Info.argtypes = [ctypes.c_void_p]
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.espeak_SetSynthCallback.argtypes = [_Callback]
    library.espeak_SetSynthCallback.restype = None
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,  # start position
        ctypes.c_int,  # its unit
        ctypes.c_uint,  # end position, 0 for none
        ctypes.c_uint,  # flags
        ctypes.POINTER(ctypes.c_uint),
        ctypes.c_void_p,
    ]
    return library


def _copy_steady_data(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the data for English; turns off the state of every voice variant, or leaves the variant out."""
    try:
        (target / _VARIANTS).mkdir(parents=True)
        for name in _DATA_FILES:
            shutil.copyfile(source / name, target / name)
        shutil.copytree(source / _ENGLISH, target / _ENGLISH)
        for path in (source / _VARIANTS).iterdir():
            settings = path.read_bytes()
            if not any(_sets(settings, name) for name in _STATEFUL):
                (target / _VARIANTS / path.name).write_bytes(settings + _STEADY)
    except OSError as error:
        raise UserError(f"eSpeak NG's data cannot be copied from {source} to {target}: {error}") from error


def _sets(settings: bytes, name: bytes) -> bool:
    return any(line.split()[:1] == [name] for line in settings.splitlines())
