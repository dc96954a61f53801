"""Train students of frozen teachers on CIFAR-100, by the protocol that most distillation papers share.

    python -m ekd_jax.main --config=configs/kd_cifar100.py:role=teacher --workdir=runs/teacher-resnet56
    python -m ekd_jax.main --config=configs/kd_cifar100.py
    python -m ekd_jax.main --config=configs/kd_cifar100.py:pair=resnet32x4-resnet8x4,loss=dkd

role: student (default); or teacher or alone, which train the teacher or the student by the labels only.
pair: teacher and student: resnet56-resnet20 (default), resnet110-resnet32, resnet110-resnet20,
    resnet32x4-resnet8x4. The teacher is expected in runs/teacher-NAME;
    --config.method.teachers="('DIR',)" names another directory.
loss: kl (default): 0.1 CE + 0.9 KL, T = 4; dkd: CE + DKD, T = 4, beta = 2 (8 for resnet32x4); dist: CE +
    DIST, T = 4, beta = gamma = 2; lskd: 0.1 CE + 9 KL of standardized logits, T = 2; dkd_lskd: dkd on
    standardized logits (constants not verified).
method: kd (default); dckd: two students and the teacher (a reconstruction); ekd: one branch for each of two
    teachers, runs/teacher-NAME and runs/teacher-NAME-2 (a reconstruction); srm: three runs in a row;
    blockwise: a structure with half of the student's operations (a reconstruction); self_distillation and
    ensemble_distillation: train teachers of the student's architecture first.

Protocol (RepDistiller, mdistiller; docs/reference/kd.md#protocol): 240 epochs; SGD with momentum 0.9 without
Nesterov, learning rate 0.05, divided by 10 at epochs 150, 180 and 210; weight decay 5e-4; batch size 64; crop
of the image padded by 4, and flip.

Expected top-1 in per cent (docs/reference/published_results.md#frozen-teachers-on-cifar-100; of the last or the
best epoch, the sources differ). Teachers: ResNet-56 72.34, ResNet-110 74.31, 32x4 79.42. Students:
                             alone     kl    dkd   dist   lskd  dkd_lskd
    ResNet-20 of ResNet-56   69.06  70.66  71.97  71.75  71.43     72.32
    ResNet-32 of ResNet-110  71.14  73.08  74.11      -  74.17     74.29
    8x4 of 32x4              72.50  73.33  76.32  76.31  76.62     77.01
Not measured here at full length: that needs an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.knobs import default_config
from ekd_jax.config.recipes import parse_variant, use_data

PAIRS = ("resnet56-resnet20", "resnet110-resnet32", "resnet110-resnet20", "resnet32x4-resnet8x4")
LOSSES = ("kl", "dkd", "dist", "lskd", "dkd_lskd")
METHODS = ("kd", "dckd", "ekd", "srm", "blockwise", "self_distillation", "ensemble_distillation")


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe for role=student|teacher|alone, pair=..., loss=kl|dkd|..., method=kd|dckd|..."""
    variant = parse_variant(
        argument, role=("student", "teacher", "alone"), pair=PAIRS, loss=LOSSES, method=METHODS
    )
    teacher, student = variant.pair.split("-")
    method = variant.method if variant.role == "student" else "baseline"
    config = default_config(method)
    use_data(config, "cifar100")
    config.model.name = teacher if variant.role == "teacher" else student
    config.model.students = (1, 1) if method in ("dckd", "ekd") else (1,)
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
        use_loss(config.method, variant.loss, dkd_beta=8.0 if teacher == "resnet32x4" else 2.0)
    return config


def use_loss(method: ConfigDict, loss: str, dkd_beta: float) -> None:
    """Set the KD loss, one of `LOSSES`, with the constants of its paper."""
    method.kd_loss = "kl" if loss == "lskd" else loss.removesuffix("_lskd")
    method.standardize = loss.endswith("lskd")
    method.dkd_beta = dkd_beta
    match loss:
        case "dkd" | "dist" | "dkd_lskd":
            method.ce_weight, method.kd_weight = 1.0, 1.0
        case "lskd":
            method.kd_weight, method.temperature = 9.0, 2.0
