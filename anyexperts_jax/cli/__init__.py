"""The command line: one file a command, each with `add` (its parser) and a function that runs it.

A command reads its arguments and calls one function of the package; heavy imports happen inside it, so that `--help`
is quick.
"""
