"""Train five students of an ImageNet ResNet by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnet_imagenet.py --config.data.manual_dir=DIR
    python -m ekd_jax.main --config=configs/resnet_imagenet.py:depth=50
    python -m ekd_jax.main --config=configs/resnet_imagenet.py:depth=18,augmentation=official

DIR holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which are prepared once.

depth: 18 (default), 34, 50, 101, 152.
augmentation=crop (default): a random part of the image resized to 224, and flip; evaluated on the center of
    the image resized to 256, as published ImageNet numbers usually are.
augmentation=official: the official code's: the image is stretched to 224x224, padded by 50, rotated by up to
    10 degrees, cropped at random to 224 and flipped; evaluated on the stretched image.
The paper's recipe: 100 epochs; SGD with Nesterov momentum 0.9, learning rate 0.1, divided by 10 at 50 % and
75 % of training; T = 2; alpha, beta, gamma = 0.7, 0.15, 0.15. It leaves open batch size and weight decay: 256
and 1e-4 are those of He et al. 2015.

Expected top-1 of students 1 to 5 trained in the ensemble, in per cent (the paper's Table 6):
    ResNet-18  70.47, 67.61, 64.88, 61.17, 58.52    ResNet-50  76.52, 75.32, 71.93, 69.46, 66.78
    ResNet-34  74.13, 73.64, 69.32, 64.19, 61.29    ResNet-101 77.97, 76.71, 74.04, 71.10, 68.57
Not measured here at full length: that needs accelerators, and CPU cores to feed them (docs/data.md).
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe for depth=18|34|50|101|152, augmentation=crop|official."""
    variant = parse_variant(argument, depth=(18, 34, 50, 101, 152), augmentation=("crop", "official"))
    config = paper(f"resnet{variant.depth}", "imagenet")
    if variant.augmentation == "official":
        config.data.fit, config.data.crop_padding, config.data.rotation = "stretch", 50, 10.0
    return config
