"""How requests reach organizations and their answers come back."""
