"""Server optimizers: how the fused delta moves the shared model. One rule per file, found automatically."""
