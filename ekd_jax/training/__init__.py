"""Training: the setup of a run, its step and loop, plans of several runs, and comparisons."""
