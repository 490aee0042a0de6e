"""Training: the run's configuration, the pure step, checkpoints, logs and the loop that ties them together."""
