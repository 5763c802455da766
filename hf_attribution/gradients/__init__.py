"""Per-example gradients: captured as factors, multiplied, projected, stored."""
