"""A description of the students of a configuration, before anything is trained: sizes, costs, memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from ekd_jax.common.text import human, table
from ekd_jax.config.build import Networks
from ekd_jax.data.opening import Data
from ekd_jax.methods.base import TeacherOutputs
from ekd_jax.models.cost import count_parameters
from ekd_jax.runs.records import DataDescription, RunDescription, StudentInfo
from ekd_jax.runs.state import copied_variables, init_variables, trainable


def describe(
    networks: Networks, model: str, teachers: Sequence[TeacherOutputs] | None = ()
) -> RunDescription:
    """Describe the students of a run.

    Args:
        networks: its networks and method.
        model: the network that students have unless they name another.
        teachers: shapes of the outputs of frozen teachers; None if these are not there yet.
    """
    ensemble, trace = networks.ensemble, networks.trace
    params = trace.init(None)["params"]
    numbers = range(1, len(ensemble.students) + 1)
    costs = [trace.cost(number) for number in numbers]
    channels = [tuple(row[number - 1].shape[-1] for row in trace.outputs.features) for number in numbers]
    sizes = [count_parameters(ensemble.student_subtrees(params, number)) for number in numbers]
    members = list(enumerate(ensemble.students)) * max(1, networks.number_of_copies)
    extra = None
    if teachers is not None:
        extra = count_parameters(init_variables(networks, None, teachers)["params"]["method"])
    return RunDescription(
        model=model,
        num_classes=trace.outputs.logits_SxBxK.shape[-1],
        input_shape=networks.input_shape,
        base_parameters=count_parameters(params["base"]),
        method_parameters=extra,
        students=tuple(
            StudentInfo(
                student=number,
                network=member.network or model,
                width=str(member).rpartition(":")[2],
                channels=channels[i],
                parameters=sizes[i],
                macs=costs[i].macs,
                activations=costs[i].activations,
                ratio=round(sizes[i] / sizes[0], 6),
            )
            for number, (i, member) in enumerate(members, 1)
        ),
    )


def describe_data(data: Data) -> DataDescription:
    """Describe the examples of a run."""
    return DataDescription(
        name=data.facts.name,
        train_examples=len(data.train),
        validation_examples=0 if data.validation is None else len(data.validation),
        test_examples=len(data.test),
        fingerprint=data.fingerprint,
    )


def as_text(description: RunDescription) -> str:
    """Return the students as a table for a terminal."""
    rows = [
        [
            s.student,
            width_label(s, description.model),
            "-".join(map(str, s.channels)),
            f"{s.parameters:,}",
            f"{100 * s.ratio:.2f}",
            human(s.macs),
            human(s.activations),
        ]
        for s in description.students
    ]
    header = ["student", "width", "channels", "parameters", "% of 1", "MACs", "activations"]
    lines = [table(rows, header)]
    if description.base_parameters:
        lines.append(f"base block: {description.base_parameters:,} parameters, counted in every student")
    if description.method_parameters:
        lines.append(
            f"layers of the method itself: {description.method_parameters:,} parameters, in training only"
        )
    return "\n".join(lines)


def width_label(student: StudentInfo, model: str) -> str:
    """Return a student's width, with the name of its network if that is not the run's."""
    return student.width if student.network == model else f"{student.network}:{student.width}"


def memory(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    config: FrozenConfigDict,
    teachers: Sequence[TeacherOutputs],
    image_bytes: int,
    devices: int = 1,
) -> dict[str, int]:
    """Estimate the bytes of each device's memory that training needs; nothing is compiled.

    Frozen teachers are not counted.

    Args:
        networks: networks and method of the run.
        optimizer: of the run.
        config: its complete configuration.
        teachers: shapes of the outputs of frozen teachers.
        image_bytes: what the images on one device take.
        devices: how many share a batch.

    Returns:
        `state`: parameters, optimizer slots and copies of the networks, divided over `train.fsdp` devices, and,
        whole, the gradients and the gathered parameters. `activations`: what the backward pass keeps of the
        device's part of a batch, taken to be inputs and outputs of convolutions and matrix products. `data`:
        the images.
    """
    variables = init_variables(networks, None, teachers)
    params = variables["params"]
    learned = trainable(networks, params)
    slots = jax.eval_shape(optimizer.init, learned)
    copies = networks.number_of_copies * _array_bytes(copied_variables(networks, variables)["params"])
    kept = _array_bytes(params) + _array_bytes(slots) + copies
    gathered = _array_bytes(params) if config.train.fsdp > 1 else 0
    cost = networks.trace.total_cost()
    images = config.train.batch_size // (config.train.accumulation_steps * devices)
    return {
        "state": kept // config.train.fsdp + _array_bytes(learned) + gathered,
        "activations": images * jnp.dtype(config.train.dtype).itemsize * (cost.kept + cost.recomputed),
        "data": image_bytes,
    }


def _array_bytes(tree: Any) -> int:
    """Return the bytes of all arrays in a tree of shapes; counters, which have no axes, are left out."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)
