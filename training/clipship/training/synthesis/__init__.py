"""Synthetic images of classes from a text-to-image pipeline: recipes, generation, filter, resuming."""
