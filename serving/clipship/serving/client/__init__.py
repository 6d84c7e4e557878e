"""The client: sync and asyncio classifiers over one scheduler."""
