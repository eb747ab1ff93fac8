"""What attacks on a training run prove about its ε."""
