"""What a frozen encoder says of a record: which vector, how precisely, kept on disk, and a head on it."""
