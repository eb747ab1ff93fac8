"""The resident node: its keys, whom it trusts, what it is asked, the process that trains."""
