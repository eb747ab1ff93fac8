"""`cotune server`: the commands of a coordinator."""
