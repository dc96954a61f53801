"""What comparisons share: every method, with its own constants for as many epochs as there are.

Networks that learn from others learn from those of the labels before. Durations that a method's protocol
counts in epochs (METHODS.md 2, 8, 12 and 13) are the same share of training here.
"""

from typing import Any

Labels = dict[str, dict[str, Any]]


def every_method(epochs: float) -> Labels:
    """Labels of a comparison whose runs have so many epochs and three students of unequal width.

    Not of these widths are OKDDip's students, whose attention is among peers of the same width, and the
    four heads of CL's tree: all are as wide as student 1. Snapshot's are three snapshots of one network;
    MEAL V2, SRM and block-wise compression train one.
    """
    ramp_up = {"method.rampup_epochs": epochs * 80 / 300}  # ONE's
    dkd = {"method.kd_loss": "dkd", "method.dkd_warmup_epochs": epochs * 20 / 240}
    dist = {"method.kd_loss": "dist"}
    lskd = {"method.standardise": True}
    one_teacher = {"method.teachers": ("{baseline}:1",)}
    weights = {"method.ce_weight": 1.0, "method.kd_weight": 1.0}
    kd = {"method.name": "kd", **one_teacher}
    return {
        "baseline": {"method.name": "baseline"},
        "oem": {"method.name": "oem"},
        "oem_dkd": {"method.name": "oem", **dkd},
        "oem_dist": {"method.name": "oem", **dist},
        "oem_lskd": {"method.name": "oem", **lskd},
        # students together
        "dml": {"method.name": "dml"},
        "one": {"method.name": "one", **ramp_up},
        "okddip": {"method.name": "okddip", "model.students": (1, 1, 1), **ramp_up},
        "cl_ilr": {"method.name": "cl_ilr", "model.students": (1, 1, 1, 1)},
        "ffl": {"method.name": "ffl", **ramp_up},
        "pcl": {"method.name": "pcl", **ramp_up},
        "kdcl": {"method.name": "kdcl"},
        "byot": {"method.name": "byot"},
        "snapshot": {"method.name": "snapshot", "model.students": (1,), "method.cycles": 3},
        # students of frozen teachers
        "kd": kd,
        "kd_dkd": {**kd, **weights, **dkd},
        "kd_dist": {**kd, **weights, **dist},
        "kd_lskd": {**kd, **lskd, "method.kd_weight": 9.0, "method.temperature": 2.0},
        "dckd": {"method.name": "dckd", **one_teacher, **ramp_up},
        "ekd": {"method.name": "ekd", "method.teachers": ("{baseline}:1", "{oem}:1", "{dml}:1")},
        "meal": {"method.name": "meal", "method.teachers": ("{baseline}:1", "{dml}:1")},
        "meal_v2": {
            "method.name": "meal_v2",
            "method.teachers": ("{baseline}:1", "{dml}:1"),
            "model.students": (1,),
            "model.initial_weights": "{baseline}:1",
            "optimizer.learning_rate": 0.01,
        },
        "srm": {
            "method.name": "srm",
            **one_teacher,
            "model.students": (1,),
            "method.dictionary_epochs": epochs / 2,
            "method.initialise_epochs": epochs / 2,
        },
        "blockwise": {"method.name": "blockwise", **one_teacher, "model.students": (1,)},
        # teachers of their own
        "self_distillation": {"method.name": "self_distillation"},
        "ensemble_distillation": {"method.name": "ensemble_distillation", "method.members": 3},
        # a new method: its label here
    }
