import io

import numpy as np
from rich.console import Console

from anyexperts_jax.train.progress import Reporter, status_line

RECORD = {
    "loss": 1.25,
    "domains": {
        "nlp": {"loss": 1.0, "token_accuracy": 0.5, "exact_match": 0.25, "examples": 8},
        "ocr": {"loss": 1.5, "token_accuracy": 0.75, "exact_match": 0.125, "examples": 7},
    },
    "real_slots": [[7.5, 8.25, None, 6.0]],
    "virtual_share": [[0.2, 0.1, None, 0.15]],
    "load_max_over_mean": [1.75],
    "dropped": [3.0],
    "mean_real_slots": 7.9,
    "nominal_real_slots": 8.0,
}

SCALARS = {"answer_loss": 0.5, "token_accuracy": 0.75}


def shown(show, terminal=False) -> str:
    out = io.StringIO()
    show(Reporter(Console(file=out, width=100, force_terminal=terminal, color_system=None)))
    return out.getvalue()


def test_tables_show_every_domain_layer_and_modality():
    text = shown(lambda reporter: reporter.tables(RECORD))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert ["nlp", "1.000", "50.0%", "25.0%", "8"] in rows
    assert ["ocr", "1.500", "75.0%", "12.5%", "7"] in rows
    assert ["0", "7.50", "8.25", "-", "6.00", "15.0%", "1.75", "3"] in rows
    assert "7.90 realised, 8.00 nominal" in text


def test_an_evaluation_is_one_line_without_markup():
    text = shown(lambda reporter: reporter.evaluation(40, RECORD))
    assert text == "step 40: validation loss 1.250, exact match: nlp 25%  ocr 12%\n"
    assert shown(lambda reporter: reporter.note("[data.encoding] is no markup")) == "[data.encoding] is no markup\n"


def test_names_of_domains_are_no_markup():
    names = ("[/red]", "[bold]x", ":cat:")
    record = RECORD | {"domains": dict.fromkeys(names, RECORD["domains"]["nlp"])}
    for show in (lambda reporter: reporter.tables(record), lambda reporter: reporter.evaluation(1, record)):
        assert all(name in shown(show) for name in names)


def test_the_bar_is_for_terminals_and_silence_for_no_console():
    def run(reporter):
        reporter.start(0, 4)
        reporter.step(2, 4, status_line(SCALARS, {"mean_real_slots": 7.9, "dropped_share": 0.0}, np.float64(1234.5)))
        reporter.stop()

    assert "2/4" in shown(run, terminal=True)
    assert "loss 0.500  answer tokens right 75%  real experts 7.90  1,234 tokens/s" in shown(run, terminal=True)
    assert shown(run) == ""
    run(Reporter(None))


def test_the_line_of_a_step_has_the_share_of_slots_dropped_where_there_were_any():
    for share, text in ((0.0123, "1.23%"), (1.0, "100%"), (1e-6, "0.0001%")):
        line = status_line(SCALARS, {"mean_real_slots": 7.9, "dropped_share": share}, 10.0)
        assert f"real experts 7.90  dropped {text} of slots  10 tokens/s" in line
