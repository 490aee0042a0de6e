"""Every path option of every command refuses an object store's address in one line and creates no folder."""

import argparse
import pathlib

import pytest

from anyexperts_jax.cli import main as cli

ADDRESSES = ("gs://bucket/x", "s3://bucket/x", "hf://datasets/x/y")


def parsers(parser, words=()):
    """Yields every command as its words and its parser."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        return [(words, parser)]
    return [one for action in inner for name, below in action.choices.items() for one in parsers(below, (*words, name))]


def filled(action):
    """Returns values for a positional or required argument that is not being tested."""
    words = [] if not action.option_strings else [action.option_strings[-1]]
    return [*words, str(next(iter(action.choices)) if action.choices else 1)]


def commands():
    """Returns a complete command line for each path option, and the option's name."""
    found = []
    for words, parser in parsers(cli._parser()):
        for action in (action for action in parser._actions if action.type is pathlib.Path):
            command = list(words)
            for other in parser._actions:
                needed = other.required or (not other.option_strings and other.nargs not in ("*", "?"))
                if other is action:
                    command += [*action.option_strings[-1:], "ADDRESS"]
                elif needed and not isinstance(other, argparse._HelpAction):
                    command += filled(other)
            found.append((command, action.dest))
    return found


COMMANDS = commands()


def test_path_options_are_found():
    assert {command[0] for command, _ in COMMANDS} >= {"train", "evolve", "evaluate", "report", "generate", "data"}
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize(("command", "option"), COMMANDS, ids=[" ".join(command) for command, _ in COMMANDS])
def test_an_address_is_refused_in_one_line_without_a_folder(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for address in ADDRESSES:
        assert cli.main([address if word == "ADDRESS" else word for word in command]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"anyexperts: {option} {address}: object stores and other addresses are not supported")
        assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "gs://bucket/x.toml"], "config gs://bucket/x.toml: object stores"),
        (["train", "gs://bucket/config.json"], "config gs://bucket/config.json: object stores"),
        (["train", "smoke", "--set", "train.start_from=gs://bucket/x"], "run directory gs://bucket/x: object stores"),
        (["train", "smoke", "--set", 'data.domains=["own"]', "--set", 'data.folders=["own=gs://b/x"]'], "gs:/"),
    ],
)
def test_an_address_in_another_argument_is_refused_without_a_folder(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("command", ["train", "evolve", "compile"])
def test_a_config_of_another_encoding_is_refused_by_name(command, encoding, tmp_path, capsys):
    path = tmp_path / "é.toml"
    path.write_bytes('# é\npreset = "tiny"\n'.encode(encoding))
    more = ["--topology", "v5e:2x2"] if command == "compile" else ["--run", str(tmp_path / "run")]
    assert cli.main([command, str(path), *more]) == 2
    said = capsys.readouterr().err
    assert f"config {path} is not UTF-8 text" in said
    assert said.count("\n") == 1
