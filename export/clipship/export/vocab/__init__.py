"""A bundle's vocabulary, listed, changed and compared without PyTorch.

What reads or drops classes needs the base install; what encodes names needs ``clipship[vocab]``.
"""
