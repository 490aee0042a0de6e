"""The version of the code that computes runs; it changes if their figures do."""

# Raise it with any change to the results of an unchanged configuration (data, model, losses, optimiser, scores), but
# not for a change of rounding. tests/reproduce/code_version_test.py computes a little of everything and fails if the
# results change under the same number. Runs of another number are repeated: see `experiment.Run.id`.
CODE_VERSION = 1
