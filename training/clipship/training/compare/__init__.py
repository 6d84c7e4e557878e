"""Methods x data sets x seeds: runs that can be killed, and their report."""
