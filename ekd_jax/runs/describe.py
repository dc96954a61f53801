"""TODO: runs.describe."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ekd_jax.common.text import human, table
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.models.cost import Cost, count, count_cost, student_cost
from ekd_jax.runs.state import init_variables


def describe(
    config: Any,
    input_shape: tuple[int, ...],
    num_classes: int,
    teachers: Sequence[TeacherOutputs] | None = (),
) -> dict[str, Any]:
    """The students of a configuration.

    Args:
        config: resolved.
        input_shape: H, W, C of the images.
        num_classes: K.
        teachers: shapes of what the frozen teachers give; None where they are not there yet.

    Returns:
        `{"model", "num_classes", "input_shape", "base_parameters", "method_parameters", "students":
        [{"student", "network", "width", "widths", "parameters", "macs", "activations", "ratio"}]}`.
        Parameters include the base block and not what the method trains besides (adaptation layers, ...);
        width is the multiplier as text; widths are the channels of the
        maps that students are compared by; macs are multiply-accumulates of convolutions and matrix
        products for one image, activations the numbers that these give (Dollar et al. 2021, "Fast and
        accurate model scaling"); ratio is of student 1's parameters.
    """
    ensemble, method = make_ensemble(config, num_classes), make_method(config)
    params = ensemble.init(None, input_shape)["params"]
    costs = [student_cost(ensemble, i + 1, input_shape) for i in range(len(ensemble.students))]
    outputs = ensemble.shapes(input_shape)
    widths = [[row[i].shape[-1] for row in outputs.features] for i in range(len(ensemble.students))]
    sizes = [count(ensemble.paths(params, i + 1)) for i in range(len(ensemble.students))]
    members = list(enumerate(ensemble.students)) * max(1, method.number_of_copies)
    extra = None
    if teachers is not None:
        extra = count(init_variables(ensemble, method, None, input_shape, teachers)["params"]["method"])
    return {
        "model": config.model.name,
        "num_classes": num_classes,
        "input_shape": list(input_shape),
        "base_parameters": count(params["base"]),
        "method_parameters": extra,
        "students": [
            {
                "student": number,
                "network": member.network or config.model.name,
                "width": str(member).rpartition(":")[2],
                "widths": widths[i],
                "parameters": sizes[i],
                "macs": costs[i].macs,
                "activations": costs[i].activations,
                "ratio": round(sizes[i] / sizes[0], 6),
            }
            for number, (i, member) in enumerate(members, 1)
        ],
    }


def as_text(description: dict[str, Any]) -> str:
    """The description's students as lines of text."""
    rows = [
        [
            s["student"],
            label(s, description["model"]),
            "-".join(map(str, s["widths"])),
            f"{s['parameters']:,}",
            f"{100 * s['ratio']:.2f}",
            human(s["macs"]),
            human(s["activations"]),
        ]
        for s in description["students"]
    ]
    header = ["student", "width", "channels", "parameters", "% of 1", "MACs", "activations"]
    base, own = description["base_parameters"], description["method_parameters"]
    lines = [table(rows, header)]
    if base:
        lines.append(f"base block: {base:,} parameters, counted in every student")
    if own:
        lines.append(f"the method's own layers: {own:,} parameters, in training only")
    return "\n".join(lines)


def label(student: dict[str, Any], model: str) -> str:
    """A student's width, with the name of its network if that is not the run's."""
    own: str = student["width"]
    return own if student["network"] == model else f"{student['network']}:{own}"


def memory(config: Any, description: dict[str, Any], data: int, devices: int = 1) -> dict[str, int]:
    """Bytes of each device's memory that training needs, estimated before anything is compiled.

    `state` is parameters, the optimizer's slots and copies of the networks, cut over `train.fsdp` devices,
    and, whole, gradients and the parameters put together; `activations` what the backward pass keeps of
    the device's part of a batch, taken to be what convolutions and matrix products get and give; `data`
    what the images on a device take. Frozen teachers are not counted.
    """
    shape, classes = tuple(description["input_shape"]), description["num_classes"]
    ensemble, method = make_ensemble(config, classes), make_method(config)
    momentum = 1 if config.optimizer.momentum else 0
    slots = {"sgd": momentum, "adam": 2, "rmsprop": 1 + momentum}[config.optimizer.name]
    networks = count(ensemble.init(None, shape)["params"])
    parameters = networks + (description["method_parameters"] or 0)
    trunk, branches = ensemble.trace(shape)
    cost = sum((count_cost(part.jaxpr) for part in [*trunk, *branches]), Cost())
    images = config.train.batch_size // (config.train.accumulation_steps * devices)
    kept = (1 + slots) * parameters + method.number_of_copies * networks
    gathered = parameters if config.train.fsdp > 1 else 0
    return {
        "state": 4 * (kept // config.train.fsdp + parameters + gathered),
        "activations": images * jnp.dtype(config.train.dtype).itemsize * (cost.kept + cost.again),
        "data": data,
    }
