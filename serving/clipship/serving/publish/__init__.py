"""A vocabulary put on a running server, and taken back."""
