"""From image files, arrays and PIL images to the encoder's pixels."""
