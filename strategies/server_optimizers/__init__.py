"""Server optimizers: how the fused delta moves the shared model. One rule a file, found by itself."""
