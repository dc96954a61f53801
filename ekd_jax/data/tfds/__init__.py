"""TODO: data/tfds."""
