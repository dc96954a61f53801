"""Compare all methods on the UCI handwritten digits: ResNet-8, students of width 1, 0.6 and 0.2, 30 epochs.

    python -m ekd_jax.compare --config=configs/compare_digits.py
    python -m ekd_jax.compare --config=configs/compare_digits.py --methods=oem,kd --seeds=1

Data and optimizer are those of configs/digits.py; `every_method` in ekd_jax/config/recipes.py lists the
labels.
Cost: one seed of all 26 labels took 31 minutes (17 of CPU time) on two cores that had other work; a run of
oem took 63 seconds, including compilation.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import comparison, digits, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the comparison; it has no variants."""
    parse_variant(argument)
    return comparison(digits(epochs=30.0))
