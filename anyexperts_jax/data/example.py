"""`Example`, one question about one signal, with its answer and its evidence in the signal."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from anyexperts_jax.core.errors import UserError, require

SAMPLE_RATE = 16_000  # of `Example.audio`, in Hz
LEVELS = (1, 2, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A question, its answer, at most one medium, and the evidence: the parts that carry the answer.

    Missing evidence marks nothing. Spans are half open, in characters of `question` or seconds of `audio`.

    Raises:
      UserError: if evidence does not fit its signal, several kinds of media are given, a text is not valid Unicode, or
        media have another type or shape or are not finite; `data.decode` converts other types.
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
        if self.level not in LEVELS:  # not `require`, which would build the message for every valid example
            raise UserError(f"{where}: level={self.level!r} is unknown; valid: 1, 2, 3")
        require(bool(self.question) and bool(self.answer), f"{where}: question and answer must not be empty")
        for name in ("question", "answer"):
            _require_text(where, name, getattr(self, name))
        if self._is_plain:
            return
        media = [name for name in ("image", "video", "audio") if getattr(self, name) is not None]
        if len(media) > 1:
            raise UserError(f"{where}: at most one kind of media per example, got {', '.join(media)}")
        for start, end in self.question_evidence:
            inside = 0 <= start < end <= len(self.question)
            require(inside, f"{where}: evidence span ({start}, {end}) is outside the question {self.question!r}")
        _require_pixels(where, "image", self.image, 3)
        _require_pixels(where, "video", self.video, 4)
        _require_samples(where, self.audio)
        seconds = 0.0 if self.audio is None else len(self.audio) / SAMPLE_RATE
        for begin, until in self.audio_evidence:
            inside = 0 <= begin < until <= seconds + 1e-6
            require(inside, f"{where}: evidence span ({begin}, {until}) s is outside the audio of {seconds:.3f} s")
        _require_same_pixels(where, self.image, self.image_evidence)
        _require_same_pixels(where, self.video, self.video_evidence)

    @property
    def _is_plain(self) -> bool:
        """Whether it is text alone, without evidence."""
        no_media = self.image is None and self.video is None and self.audio is None
        no_masks = self.image_evidence is None and self.video_evidence is None
        return no_media and no_masks and len(self.question_evidence) + len(self.audio_evidence) == 0

    @property
    def has_evidence(self) -> bool:
        """Whether the parts that carry the answer are marked."""
        masks = [mask for mask in (self.image_evidence, self.video_evidence) if mask is not None]
        return bool(self.question_evidence or self.audio_evidence or any(mask.any() for mask in masks))

    @property
    def media(self) -> str | None:
        """The kind of media: "image", "video", "audio", or None for a question in text alone."""
        return next((name for name in ("image", "video", "audio") if getattr(self, name) is not None), None)


def _require_same_pixels(where: str, pixels: np.ndarray | None, evidence: np.ndarray | None) -> None:
    if evidence is None:
        return
    expected = None if pixels is None else pixels.shape[:-1]
    require(evidence.shape == expected, f"{where}: evidence of shape {evidence.shape} on pixels of shape {expected}")


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded. Invalid UTF-8 on a command line arrives as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _require_text(where: str, name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(f"{where}: {name}={text!r} must be a string")
    if not is_unicode(text):
        raise UserError(f"{where}: {name}={text!r} is not valid Unicode")


def _require_pixels(where: str, name: str, pixels: np.ndarray | None, axes: int) -> None:
    if pixels is None:
        return
    if pixels.dtype == np.uint8 and pixels.ndim == axes and pixels.shape[-1] == 3 and pixels.size > 0:
        return
    form = "[H, W, 3]" if axes == 3 else "[F, H, W, 3]"
    raise UserError(f"{where}: {name} of {pixels.dtype} and shape {pixels.shape} must be uint8 of shape {form}")


def _require_samples(where: str, samples: np.ndarray | None) -> None:
    if samples is None:
        return
    if samples.dtype.kind != "f" or samples.ndim != 1 or samples.size == 0:  # the name of a type takes its time
        raise UserError(
            f"{where}: audio of {samples.dtype} and shape {samples.shape} must be float32 of shape [samples]"
        )
    bad = samples.size - int(np.count_nonzero(np.isfinite(samples)))
    require(bad == 0, f"{where}: audio must be finite; {bad} of {samples.size} samples are NaN or infinite")
