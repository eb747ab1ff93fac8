"""Fusions for LoRA adapters."""
