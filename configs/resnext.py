"""Train five students of ResNeXt-50 32x4d by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnext.py
    python -m ekd_jax.main --config=configs/resnext.py:data=cifar100
    python -m ekd_jax.main --config=configs/resnext.py:data=imagenet --config.data.manual_dir=DIR

data: cifar10 (default), cifar100, svhn, imagenet. For 32x32 images the network keeps its 7x7 stem of stride
    2, as in the official code, so that the last feature map is 1x1. Every student has 32 groups.
The paper's recipe: 350 epochs on CIFAR-10, 450 on CIFAR-100, 50 on SVHN, 100 on ImageNet; SGD with Nesterov
momentum 0.9, learning rate 0.1, divided by 10 at 50 % and 75 % of training; T = 2; alpha, beta, gamma = 0.7,
0.15, 0.15. The paper leaves open, and this recipe chooses: batch size 128, on ImageNet 256; weight decay
1e-4; augmentation as for ResNets.

Expected top-1 of students 1 to 5 trained in the ensemble, in per cent (the paper's Tables 2, 3, 5, 6):
    CIFAR-10 96.03, 95.95, 95.84, 95.69, 95.47    CIFAR-100 72.59, 70.32, 67.81, 65.72, 45.29
    SVHN     97.88, 96.69, 96.64, 94.23, 93.80    ImageNet  78.19, 77.85, 73.37, 70.89, 68.48
Not measured here at full length: that needs an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import DATA, paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe for data=cifar10|cifar100|svhn|imagenet."""
    return paper("resnext50_32x4d", parse_variant(argument, data=tuple(DATA)).data)
