"""Train five students of a DenseNet-BC by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/densenet.py
    python -m ekd_jax.main --config=configs/densenet.py:data=svhn
    python -m ekd_jax.main --config=configs/densenet.py:data=cifar100,size=40_190
    python -m ekd_jax.main --config=configs/densenet.py:data=imagenet --config.data.manual_dir=DIR

data: cifar10 (default), cifar100, svhn, or imagenet, for which the network is DenseNet-121.
size: growth rate and depth for CIFAR and SVHN: 12_100 (default, the paper's), 24_250, 40_190.
The paper's recipe: 350 epochs on CIFAR-10, 450 on CIFAR-100, 50 on SVHN, 100 on ImageNet; SGD with Nesterov
momentum 0.9, learning rate 0.1, divided by 10 at 50 % and 75 % of training; T = 2; alpha, beta, gamma = 0.7,
0.15, 0.15. The paper leaves open, and this recipe chooses: batch size 64 (Huang et al. 2017; the official
code has 48 and 32), on ImageNet 256; weight decay 1e-4; augmentation as for ResNets. In the official code
students 2 to 5 train the base block, except those of a DenseNet. Here they always do;
--config.method.base_gradient=pseudo_teacher gives the other behavior.

Expected top-1 of students 1 to 5 trained in the ensemble, in per cent (the paper's Tables 2, 3, 5, 6):
    CIFAR-10 94.76, 94.51, 94.29, 94.08, 93.57    CIFAR-100 75.96, 72.39, 70.09, 68.14, 49.12
    SVHN     98.03, 98.02, 97.59, 94.25, 94.17    ImageNet  75.82, 74.17, 68.44, 67.83, 66.09
Not measured here at full length: that needs an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import DATA, paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe for data=cifar10|cifar100|svhn|imagenet, size=12_100|24_250|40_190."""
    variant = parse_variant(argument, data=tuple(DATA), size=("12_100", "24_250", "40_190"))
    if variant.data == "imagenet":
        return paper("densenet121", "imagenet")
    config = paper(f"densenet_bc_{variant.size}", variant.data)
    config.train.batch_size = 64
    return config
