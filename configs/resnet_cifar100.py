"""Five students of a CIFAR ResNet on CIFAR-100 by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnet_cifar100.py
    python -m ekd_jax.main --config=configs/resnet_cifar100.py:depth=110
    python -m ekd_jax.main --config=configs/resnet_cifar100.py:depth=32,recipe=official

depth: 20 (default), 32, 44, 56, 110.
recipe=paper (default): SGD Nesterov .9, .1 -> .01 at 50 % -> .001 at 75 % of 450 epochs, T=2,
    alpha, beta, gamma = .7, .15, .15; random crop of the image padded by 4, flip.
    What the paper leaves open: batch 128 (all official CIFAR-100 configs but one); weight decay 1e-4
    (official CIFAR-10 SGD configs, the only SGD ones; He et al. 2016); images normalized by the
    training set's channel means and deviations (the official code does so for CIFAR-10 only).
recipe=official: the official code's configs/Cifar100_exp, which differ from the paper: Adam 1e-3,
    weight decay 1e-5, x.1 at epochs 200 and 300 of 350, images not normalized. Depth 20: T=3,
    weights .4, .3, .3, batch 64, x.1 at epochs 100, 180, 240, 350 of 400.
A baseline is one student alone: --config.method.name=baseline "--config.model.students=(0.2,)".

Expected top-1 after training in the ensemble, students 1 to 5, per cent (the paper's Table 3: best
test accuracy of a run, mean of 5): ResNet-32 70.97, 68.24, 65.67, 61.17, 42.17; ResNet-110 72.81,
70.14, 67.73, 65.08, 46.76. Not yet measured here at full length (benchmarks/README.md); a short run
on a subset is in docs/results.md. Wall-clock on two CPU cores: about .9 s a step for ResNet-20,
391 steps an epoch; a full run wants an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """depth=20|32|44|56|110, recipe=paper|official."""
    variant = parse_variant(argument, depth=(20, 32, 44, 56, 110), recipe=("paper", "official"))
    config = paper(f"resnet{variant.depth}", "cifar100")
    if variant.recipe == "official":
        official(config, variant.depth)
    return config


def official(config: ConfigDict, depth: int) -> None:
    """configs/Cifar100_exp of the official code (METHODS.md 1.7)."""
    config.data.mean, config.data.std = (0.0,), (1.0,)
    config.optimizer.name, config.optimizer.learning_rate = "adam", 1e-3
    config.optimizer.weight_decay = 1e-5
    config.train.epochs, config.optimizer.milestones = 350.0, (200 / 350, 300 / 350)
    if depth == 20:
        config.train.epochs, config.train.batch_size = 400.0, 64
        config.optimizer.milestones = (100 / 400, 180 / 400, 240 / 400, 350 / 400)
        config.method.temperature = 3.0
        config.method.alpha, config.method.beta, config.method.gamma = 0.4, 0.3, 0.3
