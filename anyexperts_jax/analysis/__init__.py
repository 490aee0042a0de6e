"""Analysis of a trained run: scores at any budget, importance against ground truth, pictures and the HTML report."""
