"""This machine: processor, runtimes, cache folders."""
