"""The readers of data sets, one module a layout; what is published is one table, :mod:`.records`."""
