"""Client terms: what organizations add to their gradients, and the server's part of it. One per file, found automatically."""
