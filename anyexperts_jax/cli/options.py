"""Options that several commands share."""

import argparse
import pathlib
import sys


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a preset (tiny, small, smoke), a TOML file, or a run's config.json")
    add_set(parser, "override, as in optim.lr=1e-3; repeatable")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of yours that registers routers, dispatchers and the like; imported first, recorded; repeatable",
    )


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=pathlib.Path, help="the run's directory")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))
