"""What a network is: parameters, multiply-accumulates and widths of its students; also a command.

python -m ekd_jax.describe --config=configs/resnet_cifar100.py [--num_classes=K] [--json]
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import flags
from clu import parameter_overview
from jax.extend.core import jaxprs_in_params

from ekd_jax import commands
from ekd_jax.config import make_ensemble, make_method
from ekd_jax.data.sources import known_facts
from ekd_jax.errors import UserError
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.state import init_variables
from ekd_jax.writers import table

FLAGS = flags.FLAGS


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
    members = list(enumerate(ensemble.students)) * max(1, method.copies)
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


def count(tree: Any) -> int:
    """How many parameters are in a tree of arrays or shapes."""
    return int(parameter_overview.count_parameters(tree))


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


def human(count: float) -> str:
    """41.3M, 12.5k, ..."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


OWN_CONVOLUTIONS = ("grouped_convolution", "fitted_convolution")  # functions of convolution.py


class Cost(NamedTuple):
    """Of one image.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products.
        activations: how many numbers they give.
        kept: how many numbers the backward pass keeps, taken to be what they get and give; of what is
            computed again (`train.rematerialise`) the outcome.
        again: of all that is computed again at once, the most that is kept meanwhile.
    """

    macs: int = 0
    activations: int = 0
    kept: int = 0
    again: int = 0

    def __add__(self, other: tuple[Any, ...]) -> "Cost":
        macs, activations, kept, again = other
        more = self.macs + macs, self.activations + activations, self.kept + kept
        return Cost(*more, max(self.again, again))

    def times(self, number: int) -> "Cost":
        return Cost(number * self.macs, number * self.activations, number * self.kept, self.again)


def student_cost(ensemble: Ensemble, student: int, input_shape: tuple[int, ...]) -> Cost:
    """What one image costs that goes through the network of a student, from 1."""
    trunk, branches = ensemble.trace(input_shape)
    parts = [trunk[node] for node in ensemble.routes[student - 1]]
    return sum((count_cost(part.jaxpr) for part in [*parts, branches[student - 1]]), Cost())


def count_cost(jaxpr: Any) -> Cost:
    """The cost of a jaxpr, loops included."""
    total = Cost()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        given: Any = eqn.outvars[0].aval if eqn.outvars else None
        own = eqn.params.get("name") in OWN_CONVOLUTIONS and len(eqn.invars) == 2
        if name == "conv_general_dilated" or own:
            kernel = eqn.invars[1].aval.shape
            numbers = eqn.params.get("dimension_numbers")
            outputs = kernel[numbers.rhs_spec[0] if numbers else -1]
            total += _of_product(eqn, given.size * math.prod(kernel) // outputs)
        elif name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += _of_product(eqn, given.size * math.prod(shape[axis] for axis in contracted))
        else:
            times = eqn.params["length"] if name == "scan" else 1
            inner = sum(map(count_cost, jaxprs_in_params(eqn.params)), Cost())
            if name in ("remat2", "checkpoint"):  # its name in older and newer JAX
                inner = inner._replace(kept=given.size, again=inner.kept)
            total += inner.times(times)
    return total


def _of_product(eqn: Any, macs: int) -> Cost:
    given, taken = eqn.outvars[0].aval.size, eqn.invars[0].aval.size
    return Cost(macs, given, given + taken)


def memory(config: Any, description: dict[str, Any], data: int, devices: int = 1) -> dict[str, int]:
    """Bytes of each device's memory that training needs, estimated before anything is compiled.

    `state` is parameters, the optimiser's slots and copies of the networks, cut over `train.fsdp` devices,
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
    images = config.train.batch_size // (config.train.accumulate * devices)
    kept = (1 + slots) * parameters + method.copies * networks
    gathered = parameters if config.train.fsdp > 1 else 0
    return {
        "state": 4 * (kept // config.train.fsdp + parameters + gathered),
        "activations": images * jnp.dtype(config.train.dtype).itemsize * (cost.kept + cost.again),
        "data": data,
    }


def main() -> None:
    """The command."""
    config = commands.config()
    known = known_facts(config)
    if FLAGS.num_classes is not None and FLAGS.num_classes < 1:
        raise UserError(f"--num_classes={FLAGS.num_classes} must be at least 1")
    classes = FLAGS.num_classes or known.num_classes
    teachers = None if make_method(config).has_teachers else ()  # they are not looked for
    description = describe(config, known.input_shape, classes, teachers)
    print(json.dumps(description, indent=2) if FLAGS.json else as_text(description))


if __name__ == "__main__":
    commands.define_config()
    flags.DEFINE_integer("num_classes", None, "number of classes, instead of the data set's")
    flags.DEFINE_boolean("json", False, "print JSON")
    commands.run(main)
