"""The rounds of a run: select organizations, request updates, validate them, and aggregate them."""
