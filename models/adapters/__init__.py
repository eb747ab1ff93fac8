"""Low-rank adapters: drawn, merged, recognized by the names of their parameters, and exported."""
