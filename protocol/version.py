"""The version of what server and organizations exchange. Both sides must speak the same."""

PROTOCOL = 7
