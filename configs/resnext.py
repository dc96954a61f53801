"""Five students of ResNeXt-50 32x4d by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnext.py
    python -m ekd_jax.main --config=configs/resnext.py:data=cifar100
    python -m ekd_jax.main --config=configs/resnext.py:data=imagenet --config.data.manual_dir=FOLDER

data: cifar10 (default), cifar100, svhn, imagenet. On 32x32 images the network is the same, with its 7x7/2
stem, as in the official code: the last map is a single place. There are still 32 groups in every student.
Recipe of the paper: SGD Nesterov .9, .1 -> .01 -> .001 at 50 and 75 % of 350 (CIFAR-10), 450 (CIFAR-100),
50 (SVHN) and 100 (ImageNet) epochs; T=2, alpha, beta, gamma = .7, .15, .15. What it leaves open: batch 128,
for ImageNet 256, weight decay 1e-4, augmentation as for ResNets.

Expected top-1 after training in the ensemble, students 1 to 5, per cent (the paper's Tables 2, 3, 5, 6):
    CIFAR-10 96.03, 95.95, 95.84, 95.69, 95.47    CIFAR-100 72.59, 70.32, 67.81, 65.72, 45.29
    SVHN     97.88, 96.69, 96.64, 94.23, 93.80    ImageNet  78.19, 77.85, 73.37, 70.89, 68.48
Not yet measured here at full length; a full run wants an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import DATA, paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """data=cifar10|cifar100|svhn|imagenet."""
    variant = parse_variant(argument, data=tuple(DATA))
    return paper("resnext50_32x4d", variant.data)
