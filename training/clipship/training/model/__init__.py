"""CLIP itself: loading its weights, prompts in its towers, the precision it computes in."""
