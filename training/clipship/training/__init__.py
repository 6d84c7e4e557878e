"""Models, prompts, methods, data and the training loop (PyTorch). Imports ``clipship.core`` only."""
