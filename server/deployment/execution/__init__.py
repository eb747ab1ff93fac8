"""What runs on the coordinator's machine: the supervisor, its processes, and the runs that it submits."""
