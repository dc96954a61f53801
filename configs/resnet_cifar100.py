"""Train five students of a CIFAR ResNet on CIFAR-100: configs/resnet_cifar.py with data=cifar100.

    python -m ekd_jax.main --config=configs/resnet_cifar100.py
    python -m ekd_jax.main --config=configs/resnet_cifar100.py:depth=110,recipe=official

depth: 20 (default), 32, 44, 56, 110. recipe: paper (default), official. See there what they are.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import resnet_cifar


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe for depth=20|32|44|56|110, recipe=paper|official."""
    return resnet_cifar(argument, data=("cifar100",))
