import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.example import SAMPLE_RATE, Example


def example(**changes):
    fields = {"domain": "general", "question_type": "which", "level": 1, "question": "which?", "answer": "7"}
    return Example(**(fields | {"source": "digit:3"} | changes))


IMAGE = np.zeros((16, 24, 3), np.uint8)
VIDEO = np.zeros((2, 16, 24, 3), np.uint8)
AUDIO = np.zeros(SAMPLE_RATE // 2, np.float32)


def test_media_names_the_kind():
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
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        example(**changes)
