"""A model behind an address: slots over one cache, requests that join and leave between two tokens, OpenAI's API."""
