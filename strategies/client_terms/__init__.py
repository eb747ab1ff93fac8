"""Client terms: what is added to an organisation's own gradients, and what the server does for it. One a file, found by
itself.
"""
