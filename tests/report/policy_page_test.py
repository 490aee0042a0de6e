"""The page that compares policies on a published model at several budgets."""

import json
import math

import pytest
from PIL import Image

from anyexperts_jax.evaluate.policies import Measured, table
from anyexperts_jax.report.policy_page import write_policy_page

NAN = math.nan
FOUND = [
    Measured("dense", NAN, NAN, 3.0, 0.8, seconds=2.0, unique=NAN),
    Measured("own", 8.0, 8.0, 3.0, 0.8, seconds=4.0, unique=8.0),
    *(
        Measured(name, k, k + 0.1, 3.0 + 1 / k, 1.0, seconds=k / 2, unique=k + 1.0)
        for name in "abcdefgh"
        for k in (2, 6)
    ),
    Measured("oracle", 4.0, 4.0, 2.9, 0.7, seconds=9.0, unique=NAN),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "page"
    write_policy_page(FOUND, folder, "wiki.txt: 2 rows of 16 tokens", "anyexperts evaluate models/x")
    return folder


def test_times_are_ratios_to_the_first_row_and_unknown_ones_are_dashes(folder):
    page = (folder / "README.md").read_text()
    assert "`anyexperts evaluate models/x`" in page
    assert "| dense | - | - | 20.0855 | 0.8000 | 1.00 | - |" in page
    assert "| own | 8 | 8.000 | 20.0855 | 0.8000 | 2.00 | 8.0 |" in page
    assert "seconds" not in page
    shown = table(FOUND, "wiki.txt")
    assert shown.columns[-1] == "seconds"
    assert shown.rows[1][-1] == "4.00"


def test_the_figures_are_json_without_nan(folder):
    figures = json.loads((folder / "policies.json").read_text(), parse_constant=pytest.fail)
    assert figures["rows"][0] == {
        "policy": "dense",
        "budget": None,
        "experts_a_token": None,
        "perplexity": 20.0855,
        "bits_per_byte": 0.8,
        "time": 1.0,
        "unique_experts": None,
    }
    assert len(figures["rows"]) == len(FOUND)


def test_the_curves_are_drawn(folder):
    with Image.open(folder / "policies.png") as picture:
        assert picture.width > 900
        assert len(picture.getcolors(256)) > 20
