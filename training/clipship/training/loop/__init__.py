"""A training run: its data, its steps, its state on disk."""
