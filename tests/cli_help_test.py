"""The help of every command, and the values that options accept."""

import argparse
import shlex

import pytest

from anyexperts_jax.cli import main as cli
from experiments.reproduce import __main__ as reproduce

pytestmark = pytest.mark.every_case  # one case per command; the first alone would not cover the others

SUBPARSERS = argparse._SubParsersAction


def parsers(parser):
    """Returns the parser and the parsers of its commands, by name."""
    yield parser.prog, parser
    for action in parser._actions:
        if isinstance(action, SUBPARSERS):
            for below in action.choices.values():
                yield from parsers(below)


ROOT = cli._parser()
PARSERS = dict((*parsers(ROOT), *parsers(reproduce._parser())))


def options(parser):
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction | SUBPARSERS)]


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_has_a_text_and_states_its_default(name):
    formatter = PARSERS[name]._get_formatter()
    for action in options(PARSERS[name]):
        label = action.option_strings or action.dest
        assert action.help, label
        repeatable = isinstance(action, argparse._AppendAction)
        if repeatable:
            assert "repeatable" in action.help, label
        elif action.option_strings and action.nargs != 0 and not action.required:
            said = formatter._get_help_string(action) % {"default": action.default}
            assert "(default: " in said, f"{label} does not say what it does when it is left out"
            assert "(default: None)" not in said, label


@pytest.mark.parametrize("name", PARSERS)
def test_every_help_has_examples_that_its_parser_accepts(name):
    parser = PARSERS[name]
    lines = [line.strip() for line in parser.epilog.splitlines()[1:]]
    assert lines
    top = PARSERS[name] if name.startswith("python -m") else ROOT
    for line in lines:
        command = line.partition("   ")[0].partition(" >")[0]  # the rest is a comment or for the shell
        assert command.startswith(name), f"an example of another command: {command}"
        if not command.endswith("--help"):
            top.parse_args(shlex.split(command.removeprefix(top.prog)))


@pytest.mark.parametrize("name", PARSERS)
def test_help_fits_a_terminal_of_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = PARSERS[name].format_help()
    examples = PARSERS[name].epilog.splitlines()
    assert all(len(line) < 80 for line in text.splitlines() if line not in examples)


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


RUN = "no/such/run"
WRONG = [
    (f"evaluate {RUN} --examples", "many", "--examples: 'many' must be a whole number"),
    (f"evaluate {RUN} --examples", "0", "--examples: 0 must be >= 1"),
    (f"evaluate {RUN} --examples", "-3", "--examples: -3 must be >= 1"),
    (f"evaluate {RUN} --examples", "1.5", "--examples: '1.5' must be a whole number"),
    (f"evaluate {RUN} --examples", "99999999999", "--examples: 99999999999 must be below 2^31"),
    (f"evaluate {RUN} --examples", "9" * 5000, "must be a whole number"),
    (f"evaluate {RUN} --calibration-examples", "0", "--calibration-examples: 0 must be >= 1"),
    (f"evaluate {RUN} --budget", "nan", "--budget: nan must be finite and > 0"),
    (f"evaluate {RUN} --budget", "inf", "--budget: inf must be finite and > 0"),
    (f"evaluate {RUN} --budget", "0", "--budget: 0 must be finite and > 0"),
    (f"evaluate {RUN} --budget", "much", "--budget: 'much' must be a number"),
    (f"generate {RUN} --budget", "-1", "--budget: -1 must be finite and > 0"),
    ("bench layer --rounds", "0", "--rounds: 0 must be >= 1"),
    ("bench layer --repeats", "0", "--repeats: 0 must be >= 1"),
    ("bench step --rounds", "-1", "--rounds: -1 must be >= 1"),
    ("compile tiny --topology v5e:2x4 --slices", "0", "--slices: 0 must be >= 1"),
    ("compile tiny --topology v5e:2x4 --limit", "0", "--limit: 0 must be >= 1"),
    ("data show nlp --seed", "4294967296", "--seed: 4294967296 must be below 2^32"),
    ("data show nlp --start", "-1", "--start: -1 must be >= 0"),
    ("data export nlp folder --count", "0", "--count: 0 must be >= 1"),
    ("data export nlp folder --shards", "0", "--shards: 0 must be >= 1"),
    ("data export nlp folder --seed", "-1", "--seed: -1 must be >= 0"),
    ("train smoke --process-index", "-1", "--process-index: -1 must be >= 0"),
]


@pytest.mark.parametrize(("command", "value", "message"), WRONG, ids=lambda text: text[:40])
def test_a_wrong_number_is_one_line_and_exit_code_2(command, value, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), value])
    assert stop.value.code == 2
    line = one_line(capsys)
    assert message in line
    assert line.endswith("--help")


def test_every_numeric_option_has_a_range():
    """An option whose type is plain int or float has its range checked elsewhere."""
    checked_elsewhere = {("anyexperts data show", "count"), ("anyexperts generate", "index")}
    for name, parser in PARSERS.items():
        for action in options(parser):
            if action.type in (int, float) and action.choices is None:
                assert (name, action.dest) in checked_elsewhere
