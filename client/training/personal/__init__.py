"""What an organization trains and keeps to itself: parts of the shared model, an own copy of it, or an own model."""
