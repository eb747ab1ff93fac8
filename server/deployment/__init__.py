"""A federation on the coordinator's machine: members, keys, certificates, processes, status."""
