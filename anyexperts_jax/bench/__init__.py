"""Times of the layer and of the train step, side by side with their peers in one run."""
