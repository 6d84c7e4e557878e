"""The built-in world: procedural pictures, captions, downstream data sets, and the pre-training of `clipship-tiny`."""
