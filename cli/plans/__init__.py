"""`cotune plan`, and the options by which other commands select their plan."""
