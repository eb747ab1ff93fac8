"""The resident node: its connection and keys, trust in servers, checks of requests, and the process that trains."""
