"""Receive the updates of a round: read replies, validate updates, and buffer them until they are added."""
