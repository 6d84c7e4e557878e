"""Shared contracts of the stages, and the command line. Imports nothing of the other stages."""
