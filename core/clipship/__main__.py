"""``python -m clipship``: the command line without its console script."""

from clipship.core.cli.main import entry

if __name__ == "__main__":
    entry()
