"""The JSON documents of a run as models: its summary, the entries of its rounds, and its events."""
