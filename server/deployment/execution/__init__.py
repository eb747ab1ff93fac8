"""Processes on the coordinator's machine: the supervisor, what it keeps running, and the execution of runs."""
