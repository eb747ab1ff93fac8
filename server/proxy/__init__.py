"""The TLS front of a federation: the one public port of a coordinator."""
