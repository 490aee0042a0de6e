"""The version of the code that computes runs, as far as their figures go."""

# Raised by whoever changes what a run of one and the same configuration gives: data, model, losses, optimiser, scores;
# not for a change of rounding. tests/reproduce/code_version_test.py computes a little of everything and fails when it
# comes out differently under the same number. Runs of another number are made again: see `experiment.Run.id`.
CODE_VERSION = 1
