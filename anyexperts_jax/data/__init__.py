"""Data: five domains of real signals, their encoding to sequences, and the Grain pipeline that batches them."""
