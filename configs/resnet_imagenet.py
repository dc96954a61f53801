"""Five students on ImageNet (ILSVRC 2012) by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnet_imagenet.py --config.data.manual_dir=FOLDER
    python -m ekd_jax.main --config=configs/resnet_imagenet.py:augmentation=paper

FOLDER holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; they are prepared once.
The network is a ResNet-20 of the CIFAR family on 224x224 images until the ImageNet families are there.

augmentation=crop (default): a random part of the image resized to 224, flip; measured on the middle of
    the image resized to 256, as numbers on ImageNet usually are.
augmentation=paper: the official code's: image stretched to 224x224, padded by 50, rotated by up to 10
    degrees, random crop of 224, flip; measured on the stretched image.
Recipe of the paper: 100 epochs, SGD Nesterov .9, .1 -> .01 -> .001 at 50 and 75 %, T=2, alpha, beta,
gamma = .7, .15, .15. What the paper leaves open: batch 256 and weight decay 1e-4 (He et al. 2016).

Not yet measured at full length. Wall-clock: wants accelerators and, to feed them, cores (docs/data.md).
"""

from ml_collections import ConfigDict

from ekd_jax.config import default, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """augmentation=crop|paper."""
    variant = parse_variant(argument, augmentation=("crop", "paper"))
    config = default()
    config.model.name = "resnet20"
    config.data.name, config.data.image_size = "imagenet2012", 224
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.data.fit, config.data.crop_padding = "crop", 0
    if variant.augmentation == "paper":
        config.data.fit, config.data.crop_padding, config.data.rotation = "stretch", 50, 10.0
    config.train.epochs, config.train.batch_size = 100.0, 256
    return config
