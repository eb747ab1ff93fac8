"""The tasks: what a record is, how it becomes a batch, what a prediction means. One task a file."""
