"""A user's own data on the command line, without a model."""

import json

import pytest

from anyexperts_jax.cli.main import main
from anyexperts_jax.cli.options import data_overrides
from anyexperts_jax.train.config import load_config

CHAT = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(number, same=0):
    return [
        {"messages": [{**turn, "content": f"{turn['content']}{i % (same or 99)}"} for turn in CHAT["messages"]]}
        for i in range(number)
    ]


def test_data_replaces_the_generated_domains_and_keeps_the_users_own(tmp_path):
    path = str(lines(tmp_path / "a.jsonl", chats(3)))
    alone = load_config("smoke", data_overrides("smoke", [f"mine={path}"])).data
    assert (alone.domains, alone.places()) == (("mine",), {"mine": path})
    config = tmp_path / "own.toml"
    config.write_text(f'preset = "tiny"\n[data]\ndomains = ["nlp", "old"]\nfolders = ["old={tmp_path}"]\n')
    both = load_config(config, data_overrides(str(config), [f"mine={path}", "old=elsewhere"])).data
    assert both.domains == ("nlp", "old", "mine")
    assert both.places() == {"old": "elsewhere", "mine": path}
    mixed = load_config("smoke", [*data_overrides("smoke", [f"mine={path}"]), 'data.domains=["nlp", "mine"]']).data
    assert mixed.domains == ("nlp", "mine"), "--set overrides --data"


def test_conversations_are_shown_with_the_learned_tokens_marked(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", [*chats(5)[:3], {"messages": CHAT["messages"] * 2}, *chats(5)[3:]])
    assert main(["data", "show", "--data", f"mine={path}", "--count", "4", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "JSON Lines, 1 file, 6 rows" in shown
    assert "line 4" in shown or "line 5" in shown


def folder(path, train, validation, test):
    for split, rows in {"train": train, "validation": validation, "test": test}.items():
        lines(path / f"{split}.jsonl", rows)
    return f"mine={path}"


CHECKS = {
    "good": ((chats(9)[:5], chats(9)[5:7], chats(9)[7:]), 0, "What was read, in tokens"),
    "too long": (
        ([*chats(9)[:5], {"question": "q" * 200, "answer": "a"}], chats(9)[5:7], chats(9)[7:]),
        0,
        "mine train: 1 x a mine/any example needs N positions",
    ),
    "a leak": ((chats(2), chats(2), chats(2)), 2, "mine: 6 examples stand in two splits"),
}


@pytest.mark.parametrize(("splits", "code", "said"), CHECKS.values(), ids=CHECKS)
def test_data_is_checked(splits, code, said, tmp_path, capsys):
    command = ["data", "check", "smoke", "--data", folder(tmp_path, *splits), "--out", str(tmp_path / "out")]
    assert main([*command, "--workers", "1"]) == code
    shown = capsys.readouterr()
    assert said in (shown.err if code else shown.out)
    assert (tmp_path / "out" / "lengths.png").is_file()


def test_generated_domains_need_no_check(capsys):
    assert main(["data", "check", "smoke"]) == 2
    assert "smoke reads only generated domains; give your own data: --data NAME=PATH" in capsys.readouterr().err
