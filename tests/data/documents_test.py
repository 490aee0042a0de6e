import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import documents
from anyexperts_jax.data.documents import Style
from anyexperts_jax.data.fonts import FACES

BLUE = (90, 140, 230)


def style(face="DejaVuSans", offset=(0, 0)):
    return Style(face, paper=(255, 255, 255), ink=(0, 0, 0), accent=BLUE, offset=offset)


def ink(document):
    """Returns a mask of the pixels of text: grey ones, neither white nor blue."""
    image = document.image.astype(int)
    return (image.max(axis=2) - image.min(axis=2) < 10) & (image.max(axis=2) < 200)


def layouts(face, offset):
    look = style(face, offset)
    return [
        documents.sign(look, "471", (16, 20), 10, 20),
        documents.table(look, [("A", "5"), ("B", "3")]),
        documents.table(look, [("A", "51"), ("C", "30"), ("D", "42"), ("H", "99")]),
        documents.receipt(look, [("TEA", "45"), ("BUN", "12"), ("JAM", "80"), ("HAM", "71")]),
        documents.chart(look, [("A", 9), ("B", 1)]),
        documents.chart(look, [("A", 1), ("C", 9), ("E", 5), ("G", 2)]),
    ]


@pytest.mark.parametrize("face", sorted({face for faces in FACES.values() for face in faces}))
@pytest.mark.parametrize("offset", [(-2, -2), (0, 0), (2, 2)])
def test_boxes_hold_all_ink_and_no_box_is_empty(face, offset):
    for document in layouts(face, offset):
        boxes = [box for field in document.fields for box in (field.key_box, field.value_box)]
        dark = ink(document)
        assert not (dark & ~documents.pixels_in(boxes)).any()
        for box in boxes:
            assert (dark & documents.pixels_in([box])).sum() >= 4, (face, box)


def test_boxes_do_not_overlap():
    for document in layouts("DejaVuSerif-BoldItalic", (0, 0)):
        boxes = {box for field in document.fields for box in (field.key_box, field.value_box)}
        covered = sum(documents.pixels_in([box]).astype(int) for box in boxes)
        assert covered.max() == 1


def test_bars_share_a_baseline_and_their_heights_follow_their_values():
    document = documents.chart(style(), [("A", 2), ("B", 7), ("C", 4)])
    blue = (document.image == np.array(BLUE)).all(axis=2)
    heights = []
    for field in document.fields:
        left, top, right, bottom = field.bar_box
        assert blue[top:bottom, left:right].all()
        heights.append(bottom - top)
    assert len({field.bar_box[3] for field in document.fields}) == 1
    assert heights[1] - heights[0] == 5 * (heights[2] - heights[0]) / 2  # 7 - 2 against 4 - 2
    assert heights[0] < heights[2] < heights[1]


def test_an_offset_moves_the_ink_and_its_boxes():
    at_home = documents.sign(style(), "5", (40, 56), 10, 4)
    moved = documents.sign(style(offset=(2, -1)), "5", (40, 56), 10, 4)
    np.testing.assert_array_equal(ink(moved), np.roll(ink(at_home), (-1, 2), axis=(0, 1)))
    left, top, right, bottom = at_home.fields[0].value_box
    assert moved.fields[0].value_box == (left + 2, top - 1, right + 2, bottom - 1)


def test_text_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a table of 5 rows; it has 2 to 4"):
        documents.table(style(), [("A", "1")] * 5)
    with pytest.raises(UserError, match="a receipt of 1 rows"):
        documents.receipt(style(), [("TEA", "10")])
    with pytest.raises(UserError, match="a chart of 1 bars"):
        documents.chart(style(), [("A", 1)])
    with pytest.raises(UserError, match=r"chart values \[0, 3\]"):
        documents.chart(style(), [("A", 0), ("B", 3)])
