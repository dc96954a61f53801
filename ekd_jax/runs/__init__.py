"""A run as it lies on disk: its directory, state, checkpoints, metrics, and reading it back."""
