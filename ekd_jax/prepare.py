"""Prepares a data set before anything trains on it: python -m ekd_jax.prepare --config=...

Training does the same by itself; on many hosts that share a disk do it once, before.
"""

from ekd_jax import cli
from ekd_jax.data.opening import open_data


def main() -> None:
    """The command."""
    facts = open_data(cli.config()).facts
    held_out = f"{facts.validation_examples:,} for validation, " if facts.validation_examples else ""
    print(
        f"{facts.name} is ready: {facts.train_examples:,} images to train on, {held_out}"
        f"{facts.test_examples:,} to test on, {facts.num_classes} classes"
    )


if __name__ == "__main__":
    cli.define_config()
    cli.run(main)
