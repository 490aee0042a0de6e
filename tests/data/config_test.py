import dataclasses

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.domain import DOMAIN_NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ()}, "data.domains is empty; valid: general, ocr, nlp, speech, video"),
        ({"domains": ("nlp", "vision")}, "data.domains entry='vision' is unknown; valid: general, ocr"),
        ({"domains": ("nlp", "nlp")}, "names a domain twice"),
        ({"weights": (1.0, 2.0)}, "data.weights has 2 entries for 5 domains"),
        ({"domains": ("nlp",), "weights": (0.0,)}, "data.weights: 0.0 for nlp must be finite and > 0"),
        ({"domains": ("nlp",), "weights": (float("nan"),)}, r"data\.weights\[0\]=nan must be a finite number"),
        ({"folders": ("mine",)}, "data.folders entry 'mine' must read NAME=PATH"),
        ({"folders": ("mine=/x",)}, "data.folders names 'mine', which is not in data.domains"),
        ({"folders": ("nlp=/x", "nlp=/y")}, "data.folders names 'nlp' twice"),
        ({"metrics": ("nlp",)}, "data.metrics entry 'nlp' must read NAME=METRIC, as spoken=wer"),
        ({"metrics": ("mine=wer",)}, "data.metrics: domain='mine' is unknown; valid: general, ocr"),
        ({"metrics": ("nlp=bleu",)}, "data.metrics: metric of nlp='bleu' is unknown; valid: exact, anls, wer, cer, f1"),
        ({"metrics": ("nlp=wer", "nlp=cer")}, "data.metrics names 'nlp' twice"),
        ({"levels": ()}, "data.levels is empty"),
        ({"levels": (1, 5)}, "data.levels entry=5 is unknown; valid: 1, 2, 3"),
        ({"seed": -1}, "data.seed=-1 must be in"),
        ({"train_examples": 0}, "data.train_examples=0 must be >= 1"),
        ({"prefetch": 0}, "data.prefetch=0 must be >= 1"),
        ({"packing": "best_fit"}, "data.packing='best_fit' is unknown; valid: none, first_fit"),
        ({"packing_window": 0}, "data.packing_window=0 must be >= 1"),
        ({"threads": -1}, "data.threads=-1 must be >= 0"),
        ({"workers": -2}, "data.workers=-2 must be >= 0"),
        ({"workers": 100_000}, "data.workers=100000 must be <= 1024"),
        ({"seed": 2**32}, r"data.seed=4294967296 must be in \[0, 2\^32\)"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**change)


def test_metrics_by_domain():
    assert DataConfig(metrics=("nlp=cer", "ocr=f1")).metric_names() == {"nlp": "cer", "ocr": "f1"}


def test_the_defaults_mix_all_domains_equally():
    config = DataConfig()
    assert config.domains == DOMAIN_NAMES
    assert config.shares() == pytest.approx([0.2] * 5)
    assert hash(config) == hash(dataclasses.replace(config))


def test_shares_add_up_to_one():
    config = DataConfig(domains=("nlp", "video"), weights=(1.0, 3.0))
    assert config.shares() == pytest.approx([0.25, 0.75])
    assert config.domain_index("video") == 1
    with pytest.raises(UserError, match="domain='ocr' is unknown; valid: nlp, video"):
        config.domain_index("ocr")


def test_a_folder_defines_a_domain():
    config = DataConfig(domains=("nlp", "mine"), folders=("mine=/data/a=b",))
    assert {name: str(path) for name, path in config.folder_paths().items()} == {"mine": "/data/a=b"}
