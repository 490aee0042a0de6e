import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import example as example_module
from anyexperts_jax.data.example import SAMPLE_RATE, Example


def example(**changes):
    fields = {"domain": "general", "question_type": "which", "level": 1, "question": "which?", "answer": "7"}
    return Example(**(fields | {"source": "digit:3"} | changes))


IMAGE = np.zeros((16, 24, 3), np.uint8)
VIDEO = np.zeros((2, 16, 24, 3), np.uint8)
AUDIO = np.zeros(SAMPLE_RATE // 2, np.float32)


def test_media_names_the_kind_of_medium():
    assert example().media is None
    assert example(image=IMAGE).media == "image"
    assert example(video=VIDEO).media == "video"
    assert example(audio=AUDIO).media == "audio"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": 4}, "level=4 is unknown; valid: 1, 2, 3"),
        ({"answer": ""}, "must not be empty"),
        ({"image": IMAGE, "audio": AUDIO}, "at most one kind of media per example, got image, audio"),
        ({"question_evidence": ((3, 9),)}, r"\(3, 9\) is outside the question 'which\?'"),
        ({"question_evidence": ((3, 3),)}, "outside the question"),
        ({"audio": AUDIO, "audio_evidence": ((0.2, 0.7),)}, "outside the audio of 0.500 s"),
        ({"audio_evidence": ((0.0, 0.1),)}, "outside the audio of 0.000 s"),
        ({"video_evidence": np.zeros((2, 16, 24), bool)}, "on pixels of shape None"),
        ({"question": "caf\udce9"}, r"general/which: question='caf\\udce9' is not valid Unicode"),
        ({"answer": "\ud800"}, "answer='.ud800' is not valid Unicode"),
        ({"image": IMAGE[:0]}, r"shape \(0, 24, 3\) must be"),
        ({"audio": np.full(4, np.nan, np.float32)}, "audio must be finite; 4 of 4 samples are NaN or infinite"),
        ({"audio": AUDIO[:0]}, r"audio of float32 and shape \(0,\)"),
    ],
)
def test_inconsistent_fields_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        example(**changes)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (example_module._require_text, ("answer", 7), "d/q: answer=7 must be a string"),
        (
            example_module._require_pixels,
            ("image", IMAGE / 255, 3),
            "d/q: image of float64 and shape .16, 24, 3. must be",
        ),
        (example_module._require_pixels, ("image", IMAGE[..., 0], 3), r"must be uint8 of shape \[H, W, 3\]"),
        (example_module._require_pixels, ("video", IMAGE, 4), r"must be uint8 of shape \[F, H, W, 3\]"),
        (
            example_module._require_samples,
            (AUDIO[None],),
            r"d/q: audio of float32 and shape \(1, 8000\) must be float32",
        ),
        (example_module._require_samples, (AUDIO.astype(np.int16),), "d/q: audio of int16"),
    ],
)
def test_wrong_types_are_refused_outside_of_tests_too(check, arguments, message):
    """Tests check the annotations of `Example` first, so these checks are called directly."""
    with pytest.raises(UserError, match=message):
        check("d/q", *arguments)
