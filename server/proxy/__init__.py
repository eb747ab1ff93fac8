"""The front of a federation: a TLS proxy on the coordinator's only public port."""
