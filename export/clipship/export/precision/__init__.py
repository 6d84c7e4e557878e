"""Encoder variants: float16, bfloat16 and int8 graphs, their measured ranges and their gates."""
