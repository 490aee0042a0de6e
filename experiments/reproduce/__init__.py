"""Makes tables and figures from experiments declared in files: their runs, how to run them, and their results."""
