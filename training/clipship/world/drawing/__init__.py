"""Scenes of the built-in world: what is in them, how they are drawn, what their captions say."""
