"""Compare all methods on the first 2,000 training images of CIFAR-10, for a few epochs, on a laptop.

    python -m ekd_jax.compare --config=configs/compare_cifar10.py
    python -m ekd_jax.compare --config=configs/compare_cifar10.py:epochs=30,model=resnet20 --methods=oem,kd

epochs: 10 (default), 3, 30, 100. model: resnet8 (default), resnet20; students of width 1, 0.6 and 0.2.
Augmentation and optimizer are those of configs/resnet_cifar.py, with batches of 64. Students are evaluated
once, at the end, on all 10,000 test images. `every_method` in ekd_jax/config/recipes.py lists the labels.
Such short runs show which methods learn fast from little data, not which accuracy they reach in the end.
Cost: a run of oem with epochs=3 took 70 seconds on two CPU cores that had other work, a third of it
compilation.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import comparison, paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the comparison for epochs=10|3|30|100, model=resnet8|resnet20."""
    variant = parse_variant(argument, epochs=(10, 3, 30, 100), model=("resnet8", "resnet20"))
    config = paper(variant.model, "cifar10")
    config.data.train_examples = 2000
    config.train.epochs, config.train.batch_size = float(variant.epochs), 64
    config.train.evaluate_every_epochs = config.train.checkpoint_every_epochs = float(variant.epochs)
    return comparison(config)
