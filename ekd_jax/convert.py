"""PyTorch weights as a student of ours; also a command.

    python -m ekd_jax.convert --model=resnet50 --weights=resnet50.safetensors --output=DIR
    python -m ekd_jax.convert --model=efficientnet_b0 --weights=tf_efficientnet_b0.pth --output=DIR \\
        --padding=same --batch_norm_epsilon=0.001

Reads state dicts of torchvision's and timm's networks, of RepDistiller's CIFAR ResNets and of the ensemble
method's official ones, from .safetensors or, where PyTorch is installed, .pt and .pth. The folder is like
those that `ekd_jax.extract` writes: for `evaluate` and `predict`, as a teacher, or to begin from
(`--config.model.initial_weights=DIR`).
"""

import pathlib
from typing import Any

from absl import flags

from ekd_jax import cli, models
from ekd_jax.common.errors import UserError, nearest, reason
from ekd_jax.students.convert import convert, read_state_dict
from ekd_jax.students.student import check_output, write_student

FLAGS = flags.FLAGS


def _numbers(flag: str) -> list[float]:
    """Of a flag like --mean=0.485,0.456,0.406."""
    given: Any = FLAGS[flag].value
    try:
        return [float(value) for value in given]
    except ValueError as error:
        raise UserError(f"--{flag}={','.join(given)} must be numbers with commas") from error


def main() -> None:
    """The command."""
    if FLAGS.model not in models.MODELS:
        raise UserError(f"--model={FLAGS.model} is unknown{nearest(FLAGS.model, models.MODELS)}")
    output = pathlib.Path(FLAGS.output)
    check_output(output)
    weights = pathlib.Path(FLAGS.weights)
    flagged = {"padding": FLAGS.padding, "batch_norm_epsilon": FLAGS.batch_norm_epsilon}
    options = {name: value for name, value in flagged.items() if value is not None}
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    variables, description = convert(FLAGS.model, read_state_dict(weights), shape, options)
    classes = description["architecture"]["num_classes"]
    names = [str(i) for i in range(classes)]
    if FLAGS.class_names:
        try:
            names = pathlib.Path(FLAGS.class_names).read_text().splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--class_names={FLAGS.class_names} cannot be read: {reason(error)}") from error
        if len(names) != classes:
            raise UserError(
                f"--class_names={FLAGS.class_names} has {len(names)} lines, the network {classes} classes"
            )
    write_student(
        output,
        variables,
        {
            **description,
            "student": 1,
            "class_names": names,
            "preprocessing": {
                "formula": "(image / 255 - mean) / std",
                "mean": _numbers("mean"),
                "std": _numbers("std"),
                "fit": FLAGS.fit,
                "image_size": FLAGS.image_size,
            },
            "evaluated_on": "test",
            "metrics": {},
            "provenance": {"converted_from": weights.name, "data": FLAGS.data, "test_split": ""},
        },
    )
    print(
        f"{weights} -> {output}: {FLAGS.model}, {classes} classes, {description['parameters']:,} parameters"
    )


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "our name of the network", required=True)
    flags.DEFINE_string("weights", None, "state dict: .safetensors, .pt or .pth", required=True)
    flags.DEFINE_string("output", None, "new folder to write", required=True)
    flags.DEFINE_string("class_names", None, "text file, a line a class")
    flags.DEFINE_string("data", "imagenet2012", "the set that it was trained for")
    flags.DEFINE_integer("image_size", 224, "height and width of its input")
    flags.DEFINE_enum("fit", "crop", ["native", "stretch", "crop"], "how images come to that size")
    flags.DEFINE_list("mean", ["0.485", "0.456", "0.406"], "subtracted from images scaled to [0, 1]")
    flags.DEFINE_list("std", ["0.229", "0.224", "0.225"], "divides them then")
    flags.DEFINE_enum("padding", None, ["even", "same"], "of EfficientNet; even unless given")
    flags.DEFINE_float("batch_norm_epsilon", None, "1e-5, or 1e-3 for torchvision's B5 to B7, unless given")
    cli.run(main)
