"""Image classification sets of TensorFlow Datasets (TFDS), prepared and read without TensorFlow."""
