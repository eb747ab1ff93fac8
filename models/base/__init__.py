"""The base model: its folder, how it is found and identified, and how it is loaded."""
