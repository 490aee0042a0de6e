"""The modality ids that every token carries."""

import enum


class Modality(enum.IntEnum):
    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    VIDEO = 3


NUM_MODALITIES = len(Modality)
MODALITY_NAMES = tuple(m.name.lower() for m in Modality)
