"""`Example`: one question about one signal, its answer, and where in the signal the answer is."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import require

SAMPLE_RATE = 16_000  # of `Example.audio`, in Hz
LEVELS = (1, 2, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A question, its answer, at most one kind of media, and the ground truth of which parts carry the answer.

    Evidence that is left out marks nothing. A span is half open: characters of `question`, seconds of `audio`.

    Raises:
      UserError: when evidence does not fit its signal, or more than one kind of media is given.
    """

    domain: str
    question_type: str
    level: int  # difficulty, one of LEVELS
    question: str
    answer: str
    source: str  # the split's sources it was made from, space-separated: "digit:17 digit:230", "font:DejaVuSans"
    image: UInt8[ndarray, "H W 3"] | None = None
    video: UInt8[ndarray, "F H W 3"] | None = None
    audio: Float32[ndarray, " samples"] | None = None  # SAMPLE_RATE, in [-1, 1]
    question_evidence: tuple[tuple[int, int], ...] = ()
    image_evidence: Bool[ndarray, "H W"] | None = None
    video_evidence: Bool[ndarray, "F H W"] | None = None
    audio_evidence: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        where = f"{self.domain}/{self.question_type}"
        require(self.level in LEVELS, f"{where}: level={self.level!r} is unknown; valid: 1, 2, 3")
        require(bool(self.question) and bool(self.answer), f"{where}: question and answer must not be empty")
        media = [name for name in ("image", "video", "audio") if getattr(self, name) is not None]
        require(len(media) <= 1, f"{where}: at most one kind of media per example, got {', '.join(media)}")
        for start, end in self.question_evidence:
            inside = 0 <= start < end <= len(self.question)
            require(inside, f"{where}: evidence span ({start}, {end}) is outside the question {self.question!r}")
        seconds = 0.0 if self.audio is None else len(self.audio) / SAMPLE_RATE
        for begin, until in self.audio_evidence:
            inside = 0 <= begin < until <= seconds + 1e-6
            require(inside, f"{where}: evidence span ({begin}, {until}) s is outside the audio of {seconds:.3f} s")
        _require_same_pixels(where, self.image, self.image_evidence)
        _require_same_pixels(where, self.video, self.video_evidence)

    @property
    def media(self) -> str | None:
        """The kind of media: "image", "video", "audio", or None for a question in text alone."""
        return next((name for name in ("image", "video", "audio") if getattr(self, name) is not None), None)


def _require_same_pixels(where: str, pixels: np.ndarray | None, evidence: np.ndarray | None) -> None:
    if evidence is None:
        return
    expected = None if pixels is None else pixels.shape[:-1]
    require(evidence.shape == expected, f"{where}: evidence of shape {evidence.shape} on pixels of shape {expected}")
