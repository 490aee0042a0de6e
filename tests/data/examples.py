"""Small examples written by hand, for tests of code that reads examples."""

import numpy as np

from anyexperts_jax.data.example import SAMPLE_RATE, Example

BASE = {"domain": "general", "question_type": "which", "level": 2, "source": "hand:1"}


def text_example(**changes):
    fields = {"question": "is 3 odd?", "answer": "yes", "question_evidence": ((3, 4), (5, 8))}
    return Example(**(BASE | fields | changes))


def image_example(height=16, width=24):
    """Pixel (y, x) is (y, x, 7); evidence is the 8 x 8 pixels at (4, 8): half of two patches, one above the other."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y, x, np.full_like(y, 7)], axis=-1).astype(np.uint8)
    evidence = np.zeros((height, width), bool)
    evidence[4:12, 8:16] = True
    return Example(**BASE, question="q?", answer="12", image=image, image_evidence=evidence)


def video_example():
    """Three frames of 8 x 16; evidence is 8 pixels of the last frame's second patch and 7 of its first."""
    video = np.repeat(np.arange(3, dtype=np.uint8), 8 * 16 * 3).reshape(3, 8, 16, 3)
    evidence = np.zeros((3, 8, 16), bool)
    evidence[2, 0, 1:16] = True
    return Example(**BASE, question="when?", answer="end", video=video, video_evidence=evidence)


def audio_example(seconds=0.5):
    """A 440 Hz tone; evidence from 0.2 s to 0.3 s."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    audio = (0.1 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    return Example(**BASE, question="said?", answer="one", audio=audio, audio_evidence=((0.2, 0.3),))
