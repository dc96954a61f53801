"""Five students of a ResNet-8 on the UCI handwritten digits, which come with the package.

    python -m ekd_jax.main --config=configs/digits.py

A minute on a laptop's two cores, compiling included. 1,348 training images; the 449 test images were
written by other people. Recipe: the paper's for CIFAR (SGD Nesterov .9, .1 -> .01 -> .001 at 50 and
75 %, T=2, weights .7, .15, .15), with batches of 64 and 60 epochs; no flip, as a 2 is no mirrored 2.

Test accuracy after the last epoch, per cent, mean +- std of n = 5 seeds (0 to 4):
DIGITS_TABLE
"""

from ml_collections import ConfigDict

from ekd_jax.config import default, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """No variants."""
    parse_variant(argument)
    config = default()
    config.model.name = "resnet8"
    config.data.name = "digits"
    config.data.mean, config.data.std = (0.3053,), (0.3760,)
    config.data.crop_padding, config.data.flip = 1, False
    config.train.epochs, config.train.batch_size = 60.0, 64
    config.train.evaluate_every_epochs, config.train.checkpoint_every_epochs = 10.0, 10.0
    return config
