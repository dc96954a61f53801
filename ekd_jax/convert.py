"""Make a student of PyTorch weights.

    python -m ekd_jax.convert --model=resnet50 --weights=resnet50.safetensors --output=DIR
    python -m ekd_jax.convert --model=efficientnet_b0 --weights=tf_efficientnet_b0.pth --output=DIR \\
        --padding=same --batch_norm_epsilon=0.001

Reads state dicts of torchvision's and timm's networks, of RepDistiller's CIFAR ResNets and of the ensemble
method's official ones, from .safetensors or, where PyTorch is installed, .pt and .pth. The directory is like those
that `extract` writes: for `evaluate` and `predict`, as a teacher, or to start from
(`--config.model.initial_weights=DIR`).
"""

import pathlib
import sys
from typing import Any

from absl import flags

from ekd_jax import cli, models
from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.students.convert import convert, read_state_dict
from ekd_jax.students.description import Preprocessing, Provenance, StudentDescription
from ekd_jax.students.student import LoadedStudent, check_output, write_student

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("model", None, "name of the network; `ekd models` lists them", required=True)
    flags.DEFINE_string("weights", None, "state dict: .safetensors, .pt or .pth", required=True)
    flags.DEFINE_string("output", None, "new directory to write", required=True)
    flags.DEFINE_string("class_names", None, "text file with one class name per line")
    flags.DEFINE_string("data", "imagenet2012", "data set that the network was trained for")
    flags.DEFINE_integer("image_size", 224, "height and width of its input")
    flags.DEFINE_enum("fit", "crop", ["native", "stretch", "crop"], "how images are brought to that size")
    flags.DEFINE_list("mean", ["0.485", "0.456", "0.406"], "subtracted from images scaled to [0, 1]")
    flags.DEFINE_list("std", ["0.229", "0.224", "0.225"], "by which the result is divided")
    flags.DEFINE_enum("padding", None, ["even", "same"], "of EfficientNet; even if not given")
    flags.DEFINE_float("batch_norm_epsilon", None, "1e-5, or 1e-3 for torchvision's B5 to B7, if not given")


def main() -> None:
    """Run the command."""
    if FLAGS.model not in models.MODELS:
        raise UserError(f"--model={FLAGS.model} is unknown{nearest(FLAGS.model, models.MODELS)}")
    output, weights = pathlib.Path(FLAGS.output), pathlib.Path(FLAGS.weights)
    check_output(output)
    flagged = {"padding": FLAGS.padding, "batch_norm_epsilon": FLAGS.batch_norm_epsilon}
    options = {name: value for name, value in flagged.items() if value is not None}
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    found = convert(FLAGS.model, read_state_dict(weights), shape, options)
    classes = found.network.num_classes
    description = StudentDescription(
        network=found.network,
        student=1,
        parameters=found.parameters,
        macs=found.macs,
        class_names=_class_names(classes),
        preprocessing=Preprocessing(_numbers("mean"), _numbers("std"), FLAGS.fit, FLAGS.image_size),
        provenance=Provenance(data=FLAGS.data, converted_from=weights.name),
    )
    write_student(output, LoadedStudent(description, found.variables))
    print(f"{weights} -> {output}: {FLAGS.model}, {classes} classes, {found.parameters:,} parameters")


def _class_names(classes: int) -> tuple[str, ...]:
    """Return the names in --class_names, or the numbers of the classes."""
    if not FLAGS.class_names:
        return tuple(map(str, range(classes)))
    try:
        names = pathlib.Path(FLAGS.class_names).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--class_names={FLAGS.class_names} cannot be read: {reason(error)}") from error
    if len(names) != classes:
        raise UserError(
            f"--class_names={FLAGS.class_names} has {len(names)} lines, the network {classes} classes"
        )
    return tuple(names)


def _numbers(flag: str) -> tuple[float, ...]:
    """Return the numbers in a flag such as --mean=0.485,0.456,0.406."""
    given: Any = FLAGS[flag].value
    try:
        return tuple(float(value) for value in given)
    except ValueError as error:
        raise UserError(f"--{flag}={','.join(given)} must be numbers separated by commas") from error


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
