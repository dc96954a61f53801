"""Five students of an ImageNet ResNet by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnet_imagenet.py --config.data.manual_dir=FOLDER
    python -m ekd_jax.main --config=configs/resnet_imagenet.py:depth=50
    python -m ekd_jax.main --config=configs/resnet_imagenet.py:depth=18,augmentation=official

FOLDER holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; they are prepared once.

depth: 18 (default), 34, 50, 101, 152.
augmentation=crop (default): a random part of the image resized to 224, flip; measured on the middle of
    the image resized to 256, as numbers on ImageNet usually are.
augmentation=official: the official code's: image stretched to 224x224, padded by 50, rotated by up to 10
    degrees, random crop of 224, flip; measured on the stretched image.
Recipe of the paper: 100 epochs, SGD Nesterov .9, .1 -> .01 -> .001 at 50 and 75 %, T=2, alpha, beta,
gamma = .7, .15, .15. What the paper leaves open: batch 256 and weight decay 1e-4 (He et al. 2015).

Expected top-1 after training in the ensemble, students 1 to 5, per cent (the paper's Table 6):
    ResNet-18  70.47, 67.61, 64.88, 61.17, 58.52    ResNet-50  76.52, 75.32, 71.93, 69.46, 66.78
    ResNet-34  74.13, 73.64, 69.32, 64.19, 61.29    ResNet-101 77.97, 76.71, 74.04, 71.10, 68.57
Not yet measured here at full length; wants accelerators and, to feed them, cores (docs/data.md).
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import official_imagenet_augmentation, paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """depth=18|34|50|101|152, augmentation=crop|official."""
    variant = parse_variant(argument, depth=(18, 34, 50, 101, 152), augmentation=("crop", "official"))
    config = paper(f"resnet{variant.depth}", "imagenet")
    if variant.augmentation == "official":
        official_imagenet_augmentation(config)
    return config
