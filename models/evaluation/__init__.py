"""How good a finished model is on labeled records, and how far the figures can be trusted."""
