"""What makes the figures of the docs. A package, for one of this name comes with some releases of pyarrow."""
