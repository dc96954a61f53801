"""Train five students of a ResNet-8 on the UCI handwritten digits, which come with the package.

    python -m ekd_jax.main --config=configs/digits.py

899 images are for training and 898, every other one, for testing. The paper's recipe for CIFAR (SGD with
Nesterov momentum 0.9, learning rate 0.1, divided by 10 at 50 % and 75 % of training; T = 2; alpha, beta,
gamma = 0.7, 0.15, 0.15) for 90 epochs with batches of 64, without flip, because a mirrored 2 is not a 2.

Test accuracy after the last epoch, in per cent, mean +- standard deviation of n = 5 seeds (0 to 4):
    1                99.18 +- 0.36
    2                99.04 +- 0.34
    3                98.62 +- 0.70
    4                98.78 +- 0.24
    5                97.71 +- 0.57
    ensemble teacher 99.18 +- 0.30
Cost: one minute on two cores of a laptop, including compilation.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import digits, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe; it has no variants."""
    parse_variant(argument)
    return digits(epochs=90.0)
