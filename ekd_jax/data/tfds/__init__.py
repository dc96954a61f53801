"""Data sets prepared by TensorFlow Datasets, without TensorFlow."""
