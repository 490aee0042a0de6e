"""The command line. Each command has a file with `add`, which adds its parser, and a function that runs it.

A command reads its arguments and calls one function of the package. Heavy imports are inside it, so that `--help` is
quick.
"""
