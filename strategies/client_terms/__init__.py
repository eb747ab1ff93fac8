"""Client terms: what is added to an organization's own gradients, and what the server does for it. One a file, found by
itself.
"""
