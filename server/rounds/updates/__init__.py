"""What comes back in a round: replies, whether an update may enter the model, and where updates wait."""
