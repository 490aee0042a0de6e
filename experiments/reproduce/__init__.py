"""Tables and figures from declared experiments: which runs, how they are run, and what they say."""
