"""Training runs that are recorded, repeated bit for bit, and differentiated through."""
