"""What recipes share: how each data set is read, and for how long the paper trains on it.

METHODS.md 1.7, the paper's experimental setup: epochs, optimisers and drops are the paper's; batch size,
weight decay and augmentation, which it does not state, are said here and in the recipes.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from ekd_jax.config import default


class Protocol(NamedTuple):
    """Name in TFDS, epochs of the paper, channel means and deviations of the training images."""

    name: str
    epochs: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATA = {
    "cifar10": Protocol("cifar10", 350, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Protocol("cifar100", 450, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": Protocol("svhn_cropped", 50, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": Protocol("imagenet2012", 100, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def paper(model: str, data: str) -> ConfigDict:
    """The paper's protocol for `model` on `data`.

    CIFAR: random crop of the image padded by 4, flip. SVHN: the crop alone, as a mirrored 2 is no 2;
    evaluated every epoch. ImageNet: random part of the image resized to 224, flip; evaluated on the middle
    of the image resized to 256. SGD as `default()`: Nesterov .9, .1 -> .01 -> .001 at 50 and 75 %, weight
    decay 1e-4; batches of 128, for ImageNet 256.

    Args:
        model: a key of `models.MODELS`.
        data: a key of `DATA`.
    """
    config, protocol = default(), DATA[data]
    config.model.name, config.data.name = model, protocol.name
    config.data.mean, config.data.std = protocol.mean, protocol.std
    config.train.epochs = float(protocol.epochs)
    if data == "svhn":
        config.data.flip = False
        config.train.evaluate_every_epochs = 1.0
    if data == "imagenet":
        config.data.fit, config.data.image_size, config.data.crop_padding = "crop", 224, 0
        config.train.batch_size = 256
    return config


def official_imagenet_augmentation(config: ConfigDict) -> None:
    """The official code's: the image stretched to the network's size and padded by 50, rotated by up to 10
    degrees, cropped and flipped; measured on the stretched image."""
    config.data.fit, config.data.crop_padding, config.data.rotation = "stretch", 50, 10.0


def rmsprop(config: ConfigDict) -> None:
    """EfficientNet's optimiser: RMSProp of decay .9 and momentum .9, rate .256 times .97 every 3 epochs.

    .256 belongs to the batches of 4096 that EfficientNet was trained with, as does an epsilon of 1e-3; the
    paper does not say for which batch it took it. The rate is scaled by the batch here, so that it means
    the same.
    """
    config.optimizer.name, config.optimizer.momentum = "rmsprop", 0.9
    config.optimizer.learning_rate = 0.256 * config.train.batch_size / 4096
    config.optimizer.decay, config.optimizer.decay_every_epochs = 0.97, 3.0
    config.optimizer.milestones = ()
