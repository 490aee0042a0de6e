"""Benchmarks of the layer and of the train step, interleaved with other libraries in one run."""
