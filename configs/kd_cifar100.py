"""Students of frozen teachers on CIFAR-100, by the protocol that most distillation papers share.

    python -m ekd_jax.main --config=configs/kd_cifar100.py:role=teacher --workdir=runs/teacher-resnet56
    python -m ekd_jax.main --config=configs/kd_cifar100.py
    python -m ekd_jax.main --config=configs/kd_cifar100.py:pair=resnet32x4-resnet8x4,loss=dkd

role: student (default); teacher or alone: teacher or student by the labels alone, by the same protocol.
pair: resnet56-resnet20 (default), resnet110-resnet32, resnet110-resnet20, resnet32x4-resnet8x4. The
    teacher is looked for in runs/teacher-NAME; elsewhere: --config.method.teachers="('DIR',)".
loss: kl (default): .1 CE + .9 KL, T = 4; dkd: CE + DKD, T = 4, beta 2 (8 for resnet32x4); dist: CE + DIST,
    T = 4, beta = gamma = 2; lskd: .1 CE + 9 KL of standardized logits, T = 2; dkd_lskd: dkd on standardized
    logits (its own constants are not verified).
method: kd (default); dckd: two students and the teacher, a reconstruction; ekd: a branch for each of two
    teachers (runs/teacher-NAME and -NAME-2), a reconstruction; srm: three stages; blockwise: a structure
    with half of the student's operations, a reconstruction; self_distillation, ensemble_distillation:
    teachers of their own, of the student's kind.

Protocol (RepDistiller, mdistiller; METHODS.md 4 and 13): 240 epochs, SGD .9 without Nesterov, .05 -> x.1 at
150, 180, 210, weight decay 5e-4, batch 64; crop of the image padded by 4, flip.

Expected top-1, per cent (METHODS.md 4 and 13; last epoch or best, the sources differ). Teachers: ResNet-56
72.34, ResNet-110 74.31, 32x4 79.42. Students alone and by kl, dkd, dist, lskd, dkd_lskd:
    ResNet-20 of ResNet-56   69.06   70.66  71.97  71.75  71.43  72.32
    ResNet-32 of ResNet-110  71.14   73.08  74.11      -  74.17  74.29
    8x4 of 32x4              72.50   73.33  76.32  76.31  76.62  77.01
Not measured here at full length: this wants an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.knobs import default_config
from ekd_jax.config.recipes import DATA, parse_variant

PAIRS = ("resnet56-resnet20", "resnet110-resnet32", "resnet110-resnet20", "resnet32x4-resnet8x4")
LOSSES = ("kl", "dkd", "dist", "lskd", "dkd_lskd")
METHODS = ("kd", "dckd", "ekd", "srm", "blockwise", "self_distillation", "ensemble_distillation")


def get_config(argument: str | None = None) -> ConfigDict:
    """role=student|teacher|alone, pair=..., loss=kl|dkd|dist|lskd|dkd_lskd, method=kd|..."""
    variant = parse_variant(
        argument, role=("student", "teacher", "alone"), pair=PAIRS, loss=LOSSES, method=METHODS
    )
    teacher, student = variant.pair.split("-")
    method = variant.method if variant.role == "student" else "baseline"
    config, protocol = default_config(method), DATA["cifar100"]
    config.model.name = teacher if variant.role == "teacher" else student
    config.model.students = (1, 1) if method in ("dckd", "ekd") else (1,)
    config.data.name, config.data.mean, config.data.std = protocol.name, protocol.mean, protocol.std
    config.train.epochs, config.train.batch_size = 240.0, 64
    config.optimizer.nesterov, config.optimizer.learning_rate = False, 0.05
    config.optimizer.weight_decay = 5e-4
    config.optimizer.milestones = (150 / 240, 180 / 240, 210 / 240)
    if variant.role != "student":
        return config
    if "teachers" in config.method:
        config.method.teachers = (f"runs/teacher-{teacher}",)
    if method == "ekd":
        config.method.teachers = (f"runs/teacher-{teacher}", f"runs/teacher-{teacher}-2")
    if method == "kd":
        loss(config.method, variant.loss, beta=8.0 if teacher == "resnet32x4" else 2.0)
    return config


def loss(method: ConfigDict, name: str, beta: float) -> None:
    """The constants of a loss as its paper has them."""
    method.kd_loss = "kl" if name == "lskd" else name.removesuffix("_lskd")
    method.standardize = name.endswith("lskd")
    method.dkd_beta = beta
    match name:
        case "dkd" | "dist" | "dkd_lskd":
            method.ce_weight, method.kd_weight = 1.0, 1.0
        case "lskd":
            method.kd_weight, method.temperature = 9.0, 2.0
