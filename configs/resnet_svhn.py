"""Five students of a CIFAR ResNet on SVHN by online ensemble knowledge distillation.

    python -m ekd_jax.main --config=configs/resnet_svhn.py
    python -m ekd_jax.main --config=configs/resnet_svhn.py:depth=110
    python -m ekd_jax.main --config=configs/resnet_svhn.py --config.data.extra=True

depth: 20 (default), 32, 44, 56, 110.
Recipe of the paper: 73,257 training and 26,032 test images, without the 531,131 extra ones; 50 epochs;
SGD Nesterov .9, .1 -> .01 -> .001 at 50 and 75 %; T=2, alpha, beta, gamma = .7, .15, .15.
What the paper leaves open, and no official config says: batch 128 and weight decay 1e-4 as for CIFAR;
random crop of the image padded by 4 and no flip, as a mirrored 2 is no 2; normalization by the training
set's channel means and deviations. data.extra=True adds the extra images, as ONE does.

Expected top-1 after training in the ensemble, students 1 to 5, per cent (the paper's Table 5: best
test accuracy of a run, mean of 5): ResNet-20 97.10, 96.92, 95.53, 92.03, 92.67; ResNet-110 97.87,
97.84, 96.81, 95.90, 93.78. Not yet measured here at full length (benchmarks/README.md); a short run on
a subset is in docs/results.md. Wall-clock on two CPU cores: about .9 s a step for ResNet-20, 572 steps
an epoch; a full run wants an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.recipes import paper, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """depth=20|32|44|56|110."""
    variant = parse_variant(argument, depth=(20, 32, 44, 56, 110))
    config = paper(f"resnet{variant.depth}", "svhn")
    return config
