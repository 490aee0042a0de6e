"""Pictures and videos are resized to grids of patches, and training, evaluation and generation see the same grid."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.array_records import export_array_record
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.decode import decode_picture
from anyexperts_jax.data.domain import domain
from anyexperts_jax.data.encode import encode
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.pipeline import eval_batches, train_iterator
from anyexperts_jax.data.prepare import patch_grid, prepare
from anyexperts_jax.evaluate.ask import own_example
from data.examples import BASE, image_example, text_example, video_example

SPEC = EncodingSpec(max_length=32, max_patches=12, max_frames=0)


@pytest.mark.parametrize(
    ("height", "width", "most", "grid"),
    [
        (16, 24, 6, (2, 3)),  # whole patches that fit
        (16, 24, 600, (2, 3)),  # never enlarged
        (16, 24, 5, (2, 2)),
        (17, 30, 99, (2, 4)),  # rounded to whole patches
        (12, 11, 99, (2, 1)),  # half a patch rounds up
        (1, 1, 4, (1, 1)),
        (640, 480, 72, (10, 7)),
        (480, 640, 72, (7, 10)),
        (4000, 4000, 72, (8, 8)),
        (4000, 4000, 1, (1, 1)),
        (1, 10_000, 72, (1, 72)),
        (8000, 8, 72, (72, 1)),
    ],
)
def test_a_grid_keeps_the_shape_and_the_limit(height, width, most, grid):
    assert patch_grid(height, width, 8, most) == grid


def test_every_grid_is_near_the_pictures_shape():
    """Over many sizes: the grid is within the limit, and some scale brings both sides within half a patch of it."""
    rng = np.random.default_rng(0)
    for height, width, most in rng.integers(1, 400, (300, 3)).tolist():
        rows, columns = patch_grid(height, width, 8, most)
        assert 1 <= rows * columns <= most
        low = max(0 if side == 1 else (side - 0.5) * 8 / pixels for side, pixels in ((rows, height), (columns, width)))
        high = min((side + 0.5) * 8 / pixels for side, pixels in ((rows, height), (columns, width)))
        assert low <= min(high, 1)
        if high < 1:  # the next larger scale would exceed the limit
            larger = [side + (np.isclose((side + 0.5) * 8 / n, high)) for side, n in ((rows, height), (columns, width))]
            assert larger[0] * larger[1] > most


@pytest.mark.parametrize("name", ["general", "ocr", "video"])
@pytest.mark.parametrize("pictures", ["fit", "whole"])
def test_generated_pictures_are_not_resized(name, pictures):
    spec = EncodingSpec(pictures=pictures)
    for index in range(3):
        example = domain(name).example("test", index)
        same = prepare(example, spec)
        for field in ("image", "video", "image_evidence", "video_evidence"):
            assert getattr(same, field) is getattr(example, field)


def test_evidence_is_resized_with_its_picture():
    """The picture is twice as large as fits, and its right half is the evidence."""
    evidence = np.zeros((32, 64), bool)
    evidence[:, 32:] = True
    image = np.where(evidence[..., None], 255, 0).repeat(3, axis=-1).astype(np.uint8)
    example = Example(**BASE, question="q?", answer="12", image=image, image_evidence=evidence)
    small = prepare(example, dataclasses.replace(SPEC, max_patches=8))
    assert small.image.shape == (16, 32, 3)
    assert small.image_evidence[:, :16].sum() == 0
    assert small.image_evidence[:, 16:].all()
    assert small.image[:, 20:].min() > 250
    assert prepare(small, SPEC).image is small.image


def test_a_long_video_keeps_frames_evenly_spaced():
    video = np.repeat(np.arange(7, dtype=np.uint8), 8 * 16 * 3).reshape(7, 8, 16, 3)
    example = Example(**BASE, question="q?", answer="1", video=video, video_evidence=np.ones((7, 8, 16), bool))
    for limits, frames in (({"max_video_frames": 3}, [1, 3, 5]), ({"max_patches": 2, "max_video_frames": 9}, [1, 5])):
        found = prepare(example, dataclasses.replace(SPEC, **limits))
        assert found.video[:, 0, 0, 0].tolist() == frames
        assert found.video_evidence.shape == found.video.shape[:3]
    assert found.video.shape[1:3] == (8, 8)  # one patch a frame
    fields = encode(example, dataclasses.replace(SPEC, max_video_frames=3))
    assert fields["time_BT"][1:7].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_picture_is_refused_in_a_run_without_pictures():
    blind = dataclasses.replace(SPEC, max_patches=0)
    with pytest.raises(UserError, match=r"general image of 24 x 16 pixels: this run reads no images: data.encoding"):
        prepare(image_example(), blind)
    with pytest.raises(UserError, match="general video of 16 x 8 pixels: this run reads no images"):
        prepare(video_example(), blind)
    text = text_example()
    assert prepare(text, blind) is text


@dataclasses.dataclass(frozen=True)
class Given:
    """A source of one example."""

    example: Example
    question_types = ("which",)
    metric = "exact"

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.example


def test_training_evaluation_and_generation_see_the_same_patches(tmp_path):
    """A photograph is read from a file: rotated, too large, and not a whole number of patches."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 83, 3), np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6  # a quarter turn
    file = tmp_path / "photo.png"
    Image.fromarray(pixels).save(file, exif=tags)
    example = Example(**BASE, question="what?", answer="?", image=decode_picture(file, "here"))
    for split in ("train", "test"):
        export_array_record(Given(example), tmp_path / "mine", split)
    data = DataConfig(domains=("mine",), folders=(f"mine={tmp_path / 'mine'}",), encoding=SPEC, threads=0)
    trained_on = next(train_iterator(data, 1))
    (evaluated,) = eval_batches(data, "mine", "test", 1, 1)
    asked = encode(own_example("what?", SPEC, image=file), SPEC)
    assert asked["patch_row_BP"].max() == 3  # 83 high and 50 wide: 4 rows of 2 or 3
    assert asked["patches_BPX"].any()
    for name in ("patches_BPX", "patch_row_BP", "patch_column_BP", "modality_BT", "tokens_BT"):
        np.testing.assert_array_equal(getattr(trained_on, name)[0], asked[name])
        np.testing.assert_array_equal(getattr(evaluated, name)[0], asked[name])
