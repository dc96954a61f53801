"""Every method on the first 2,000 images of CIFAR-10, for a few epochs: what to expect of them on a laptop.

    python -m ekd_jax.compare --config=configs/compare_cifar10.py
    python -m ekd_jax.compare --config=configs/compare_cifar10.py:epochs=30,model=resnet20 --methods=oem,kd

epochs: 10 (default), 3, 30, 100. model: resnet8 (default), resnet20; students of width 1, .6 and .2.
Augmentation and optimizer are the paper's (configs/resnet_cifar10.py) with batches of 64, and all 10,000
test images are looked at once, at the end; which labels there are says ekd_jax/compared.py. Such short runs
say which methods learn fast from little, not what they come to. A run of oem with epochs=3 took 70 seconds
on two CPU cores that had other work, a third of it compiling.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import every_method, paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """epochs=10|3|30|100, model=resnet8|resnet20."""
    variant = parse_variant(argument, epochs=(10, 3, 30, 100), model=("resnet8", "resnet20"))
    config = paper(variant.model, "cifar10")
    config.model.students = (1, 0.6, 0.2)
    config.data.train_examples = 2000
    config.train.epochs, config.train.batch_size = float(variant.epochs), 64
    config.train.evaluate_every_epochs = config.train.checkpoint_every_epochs = float(variant.epochs)
    return ConfigDict(
        {"common": config, "seeds": 3, "methods": every_method(config.train.epochs)}, convert_dict=False
    )
