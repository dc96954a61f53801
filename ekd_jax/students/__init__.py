"""Students on their own: loading, predicting, writing, and converting PyTorch weights."""
