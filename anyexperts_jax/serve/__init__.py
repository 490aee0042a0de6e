"""Serves a model over OpenAI's HTTP API with continuous batching: requests join and leave between two tokens."""
