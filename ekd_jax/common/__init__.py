"""What every room may use: errors, knobs, records, files, logging, progress, devices and processes."""
