"""Many organisations on one machine: to see whether federation pays off before anyone signs anything."""
