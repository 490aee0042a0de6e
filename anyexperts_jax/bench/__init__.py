"""Benchmarks of the layer, the train step, the data pipeline and the server, interleaved with other libraries."""
