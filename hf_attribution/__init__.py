"""Training data attribution for Hugging Face models, measured by retraining."""
