"""`cotune plan`, and the options by which other commands are told their plan."""
