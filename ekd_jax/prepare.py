"""Prepare a data set before anything is trained on it.

    python -m ekd_jax.prepare --config=configs/resnet_cifar100.py [--config.data.manual_dir=DIR]

Training prepares it, too. On many hosts that share a disk, do it once, before.
"""

import sys

from ekd_jax import cli
from ekd_jax.data.opening import open_data


def define_flags() -> None:
    """Define the command's own flags."""
    cli.define_config()


def main() -> None:
    """Run the command."""
    facts = open_data(cli.config()).facts
    held_out = f"{facts.validation_examples:,} for validation, " if facts.validation_examples else ""
    print(
        f"{facts.name} is ready: {facts.train_examples:,} images to train on, {held_out}"
        f"{facts.test_examples:,} to test on, {facts.num_classes} classes"
    )


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
