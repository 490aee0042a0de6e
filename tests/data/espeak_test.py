import concurrent.futures
import ctypes
import hashlib
import importlib
import itertools
import subprocess
import sys
import types

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import espeak
from anyexperts_jax.data.five_domains import speech


@pytest.fixture
def unloaded():
    """Unloads eSpeak NG before and after the test, so that it starts as in a new process."""
    espeak._engine.cache_clear()
    yield
    espeak._engine.cache_clear()


def test_an_utterance_does_not_depend_on_earlier_ones():
    voices = [f"{accent}+{variant}" for variant in ("Alex", "f1", "m3", "norbert") for accent in ("en-us", "en-029")]
    first = {voice: espeak.speak("seven one stop", voice) for voice in voices}
    for i, voice in enumerate(reversed(voices)):
        espeak.speak("quite another thing"[: 5 + i], "en-gb-scotland+m7", words_per_minute=120 + i, pitch=20 + i)
        again = espeak.speak("seven one stop", voice)
        np.testing.assert_array_equal(again.samples, first[voice].samples)
        assert again.word_starts == first[voice].word_starts


def test_another_process_gives_the_same_samples():
    code = (
        "import hashlib; from anyexperts_jax.data import espeak;"
        "print(hashlib.sha256(espeak.speak('go down', 'en-us+belinda').samples.tobytes()).hexdigest())"
    )
    espeak.speak("something before it", "en-us+m1")
    here = hashlib.sha256(espeak.speak("go down", "en-us+belinda").samples.tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_known_samples():
    """The samples are eSpeak NG 1.52.0's; a new version may speak differently, and then the examples change too."""
    if espeak.version() != "1.52.0":
        pytest.skip(f"eSpeak NG {espeak.version()} is not 1.52.0")
    said = espeak.speak("seven one stop", "en-us+m1")
    assert hashlib.sha256(said.samples.tobytes()).hexdigest()[:16] == "32a73c0d791096a5"
    assert said.word_starts == (0, 8075, 13512)


@pytest.mark.usefixtures("unloaded")
def test_threads_do_not_mix_their_utterances():
    """This holds even for threads that load the library at the same time."""
    texts = ["one", "two", "three four", "stop", "seven eight nine"] * 8
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: espeak.speak(text, "en-us+m1").samples.tobytes(), texts))
    assert together == [espeak.speak(text, "en-us+m1").samples.tobytes() for text in texts]


def test_every_voice_of_the_speech_domain_speaks_and_differs():
    variants = list(itertools.chain.from_iterable(speech.VARIANTS.values()))
    assert set(variants) <= set(espeak.variants())
    said = [espeak.speak("nine", f"en-us+{variant}").samples for variant in variants]
    assert all(np.abs(samples).max() > 1000 for samples in said)
    assert len({samples.tobytes() for samples in said}) == len(variants)


def test_rate_and_pitch_have_an_effect():
    slow, fast = (espeak.speak("seven", "en-us+m1", words_per_minute=rate).samples for rate in (120, 240))
    assert len(slow) > 1.3 * len(fast)
    low, high = (espeak.speak("seven", "en-us+m1", pitch=pitch).samples for pitch in (20, 80))
    assert low.tobytes() != high.tobytes()


def test_each_word_has_a_start():
    for first, second in itertools.product(("zero", "go", "up", "stop"), ("eight", "one", "down")):
        said = espeak.speak(f"{first} {second}", "en-us+m1")
        assert len(said.word_starts) == 2
        assert 0 <= said.word_starts[0] < said.word_starts[1] < len(said.samples)


def test_bad_voices_and_numbers_are_refused():
    with pytest.raises(UserError, match="variant='nobody' is unknown; valid: Alex, "):
        espeak.speak("one", "en-us+nobody")
    with pytest.raises(UserError, match="voice='en-us' must be an accent and a variant"):
        espeak.speak("one", "en-us")
    with pytest.raises(UserError, match="no English accent 'xx-nowhere'"):
        espeak.speak("one", "xx-nowhere+m1")
    with pytest.raises(UserError, match="words_per_minute=20"):
        espeak.speak("one", "en-us+m1", words_per_minute=20)
    with pytest.raises(UserError, match="pitch=101"):
        espeak.speak("one", "en-us+m1", pitch=101)


def test_voices_that_keep_state_are_excluded():
    assert not {"m2", "klatt2", "whisper"} & set(espeak.variants())


def fake_loader(library: str, data: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(get_library_path=lambda: library, get_data_path=lambda: data)


@pytest.mark.usefixtures("unloaded")
def test_a_missing_wheel_library_or_data_is_refused_in_one_line(monkeypatch, tmp_path):
    import espeakng_loader

    library, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        espeak.speak("one", "en-us+m1")
    monkeypatch.setattr(importlib, "import_module", lambda name: fake_loader(str(tmp_path / "none.so"), data))
    with pytest.raises(UserError, match="cannot be loaded"):
        espeak.speak("one", "en-us+m1")
    monkeypatch.setattr(importlib, "import_module", lambda name: fake_loader(library, str(tmp_path / "no-data")))
    with pytest.raises(UserError, match="data cannot be copied"):
        espeak.speak("one", "en-us+m1")
    monkeypatch.setattr(importlib, "import_module", lambda name: fake_loader(library, data))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: types.SimpleNamespace())
    with pytest.raises(UserError, match="older than eSpeak NG"):
        espeak.speak("one", "en-us+m1")


@pytest.mark.usefixtures("unloaded")
def test_the_data_folder_is_the_engines():
    folder = espeak._engine().data.parent
    assert folder.is_dir()
    espeak._engine.cache_clear()
    assert not folder.exists()
