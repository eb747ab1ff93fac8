"""Checks of a round: of the request, of the model's gradients, and of what training has changed."""
