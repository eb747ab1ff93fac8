"""Plans side by side under the same seeds, and private selection among them."""
