"""Shared by every other package: errors, knobs, records, files, logging, progress, devices and processes."""
