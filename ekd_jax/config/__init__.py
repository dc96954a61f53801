"""Configurations: knobs, how a configuration is checked, recipes, and what is built from one."""
