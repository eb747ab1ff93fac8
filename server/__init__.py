"""The coordinator: the round loop, admission of updates, checkpoints, evaluation and the report."""
