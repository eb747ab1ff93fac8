"""The folder of a run: made, written while it goes on, and concluded."""
