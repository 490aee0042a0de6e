"""Data: five generated domains and the user's own, their encoding as sequences, and the Grain pipeline of batches."""
