"""How much privacy a sequence of steps spends, and several runs together."""
