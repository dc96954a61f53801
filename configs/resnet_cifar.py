"""Train five students of a CIFAR ResNet by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnet_cifar.py
    python -m ekd_jax.main --config=configs/resnet_cifar.py:data=cifar100,depth=110
    python -m ekd_jax.main --config=configs/resnet_cifar.py:depth=32,recipe=official
    python -m ekd_jax.main --config=configs/resnet_cifar.py:data=svhn --config.data.extra=True

data: cifar10 (default), cifar100, svhn.
depth: 20 (default), 32, 44, 56, 110.
recipe=paper (default): 350 epochs on CIFAR-10, 450 on CIFAR-100, 50 on SVHN (73,257 training images, without
    the 531,131 extra ones, which data.extra=True adds as ONE does); SGD with Nesterov momentum 0.9, learning
    rate 0.1, divided by 10 at 50 % and 75 % of training; T = 2; alpha, beta, gamma = 0.7, 0.15, 0.15.
    The paper leaves open, and this recipe chooses: batch size 128 (as all but one of the official configs for
    CIFAR ResNets); weight decay 1e-4 (as the official SGD configs, and He et al. 2016); random crop of the
    image padded by 4, and flip, except on SVHN, where a mirrored 2 is not a 2; images normalized with mean
    and standard deviation per channel of the training set (the official code does so for CIFAR-10 only).
recipe=official: the configs of the official code, which differ from the paper; there are none for SVHN
    (docs/reference/oem.md#official-configurations).
    CIFAR-10 (configs/Cifar10_exp; depth 20, 32, 110): SGD with momentum 0.9 without Nesterov; T = 3; learning
    rate, drops, epochs and weights depend on the depth. Learning rates of 0.01 and 0.001 look like those of
    the last part of runs that were resumed by hand.
    CIFAR-100 (configs/Cifar100_exp): Adam with learning rate 1e-3, divided by 10 at epochs 200 and 300 of
    350; weight decay 1e-5; images not normalized. Depth 20: T = 3; weights 0.4, 0.3, 0.3; batch size 64;
    learning rate divided by 10 at epochs 100, 180, 240 and 350 of 400.
A baseline is a student trained alone: --config.method.name=baseline "--config.model.students=(0.2,)".

Expected top-1 of students 1 to 5 trained in the ensemble, in per cent (the paper's Tables 2, 3 and 5: mean
over 5 runs of the best test accuracy of each run):
    CIFAR-10   ResNet-20 92.13, 92.18, 91.78, 91.45, 91.03    ResNet-110 94.24, 94.18, 93.98, 93.57, 93.28
    CIFAR-100  ResNet-32 70.97, 68.24, 65.67, 61.17, 42.17    ResNet-110 72.81, 70.14, 67.73, 65.08, 46.76
    SVHN       ResNet-20 97.10, 96.92, 95.53, 92.03, 92.67    ResNet-110 97.87, 97.84, 96.81, 95.90, 93.78
Those of students 4 and 5 on CIFAR-10 are doubtful: a network of 11 thousand parameters is not expected to
pass 85 %. Full runs have not been measured here (benchmarks/README.md); docs/results.md has short runs on
subsets.

Cost: a step of ResNet-20 takes about 0.9 s on two CPU cores, and an epoch has 391 steps on CIFAR, 572 on
SVHN. A full run needs an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import resnet_cifar


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe for data=cifar10|cifar100|svhn, depth=20|32|44|56|110, recipe=paper|official."""
    return resnet_cifar(argument, data=("cifar10", "cifar100", "svhn"))
