"""A report on runs: what is computed from them, figures, and the page."""
