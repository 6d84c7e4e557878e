"""How clipship-tiny was trained on the built-in world."""
