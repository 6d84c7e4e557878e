"""How fast a server answers, beside the same engine in this process."""
