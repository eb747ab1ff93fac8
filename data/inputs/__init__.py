"""What a record becomes before a model reads it: batches of fixed shapes, limits of tokens, images."""
