"""A trained run measured: scores at any budget, importance against ground truth, answers to one question."""
