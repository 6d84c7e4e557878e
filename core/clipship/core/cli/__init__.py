"""The command line: its verbs and shared options."""
