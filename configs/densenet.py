"""Five students of a DenseNet-BC by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/densenet.py
    python -m ekd_jax.main --config=configs/densenet.py:data=svhn
    python -m ekd_jax.main --config=configs/densenet.py:data=cifar100,size=40_190
    python -m ekd_jax.main --config=configs/densenet.py:data=imagenet --config.data.manual_dir=FOLDER

data: cifar10 (default), cifar100, svhn, or imagenet, where the network is DenseNet-121.
size: growth rate and depth for CIFAR and SVHN: 12_100 (default, the paper's), 24_250, 40_190.
Recipe of the paper: SGD Nesterov .9, .1 -> .01 -> .001 at 50 and 75 % of 350 (CIFAR-10), 450 (CIFAR-100),
50 (SVHN) and 100 (ImageNet) epochs; T=2, alpha, beta, gamma = .7, .15, .15. What it leaves open: batch 64
(Huang et al. 2017; the official code takes 48 and 32), for ImageNet 256, weight decay 1e-4, augmentation
as for ResNets. In the official code the students 2 to 5 of a DenseNet do not train the base block, in those
of all other networks they do; here they do (--config.method.base_gradient=pseudo_teacher for its way).

Expected top-1 after training in the ensemble, students 1 to 5, per cent (the paper's Tables 2, 3, 5, 6):
    CIFAR-10 94.76, 94.51, 94.29, 94.08, 93.57    CIFAR-100 75.96, 72.39, 70.09, 68.14, 49.12
    SVHN     98.03, 98.02, 97.59, 94.25, 94.17    ImageNet  75.82, 74.17, 68.44, 67.83, 66.09
Not yet measured here at full length; a full run wants an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import DATA, paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """data=cifar10|cifar100|svhn|imagenet, size=12_100|24_250|40_190."""
    variant = parse_variant(argument, data=tuple(DATA), size=("12_100", "24_250", "40_190"))
    if variant.data == "imagenet":
        return paper("densenet121", "imagenet")
    config = paper(f"densenet_bc_{variant.size}", variant.data)
    config.train.batch_size = 64
    return config
