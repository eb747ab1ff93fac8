"""`cotune client`: the commands of an organization."""
