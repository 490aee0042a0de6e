"""Runs tasks of EleutherAI's evaluation harness on a run or a published checkpoint, at several budgets."""
