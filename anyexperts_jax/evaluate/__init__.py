"""Measures trained runs: scores at any budget, importance against ground truth, answers to single questions."""
