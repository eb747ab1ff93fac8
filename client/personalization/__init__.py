"""The finished model at an organization: adapted to its own records, and compared with what it had."""
