"""Pre-training of clipship-tiny on the built-in world."""
