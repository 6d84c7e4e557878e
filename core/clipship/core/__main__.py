"""``python -m clipship.core``: the command line without its console script."""

from clipship.core.cli import entry

if __name__ == "__main__":
    entry()
