"""How good a model is on a test set, in the figures of each task."""
