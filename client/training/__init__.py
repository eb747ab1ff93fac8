"""One round at an organization: from the shared state to an update."""
