"""Make a student of PyTorch weights.

    python -m ekd_jax.convert --model=resnet50 --weights=resnet50.safetensors --output=DIR
    python -m ekd_jax.convert --model=efficientnet_b0 --weights=tf_efficientnet_b0.pth --output=DIR \\
        --padding=same --batch_norm_epsilon=0.001
    python -m ekd_jax.convert --model=resnet20 --weights=RUN/Model_saved_states/Epoch_341 --output=DIR \\
        --data=cifar100 --image_size=32 --fit=native --mean=0 --std=1

Reads state dicts, bare or in training checkpoints, from .safetensors or, where PyTorch is installed, .pth, .pt, .bin,
.ckpt, .tar and .t7; nothing in the file is executed. The networks are those of torchvision, timm, EfficientNet-PyTorch,
RepDistiller and the ensemble method's official code. The directory is like those that `extract` writes: for
`evaluate` and `predict`, as a teacher, or to start from (`--config.model.initial_weights=DIR`).

A directory that the official code wrote, with BaseNet.pth and student_0.pth, student_1.pth, ..., becomes
OUTPUT/student_1, OUTPUT/student_2, ...
"""

import dataclasses
import math
import pathlib
import re
import sys
from fractions import Fraction
from typing import Any

from absl import flags

from ekd_jax import cli, models
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.students.class_names import known_class_names, read_class_names
from ekd_jax.students.convert import Converted, Request, convert_students
from ekd_jax.students.description import Preprocessing, Provenance, StudentDescription
from ekd_jax.students.official import is_official, read_official
from ekd_jax.students.state_dict import StateDict, read_state_dict
from ekd_jax.students.student import LoadedStudent, check_output, write_student, write_students

FLAGS = flags.FLAGS
EFFICIENTNET_SIZES = (224, 240, 260, 300, 380, 456, 528, 600)  # of B0 to B7
LARGEST_IMAGE = 4096


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("model", None, "name of the network; `ekd models` lists them", required=True)
    flags.DEFINE_string(
        "weights", None, "file of PyTorch weights, or a directory of the official code", required=True
    )
    flags.DEFINE_string("output", None, "new directory to write", required=True)
    flags.DEFINE_boolean("ema", False, "take the averaged (EMA) weights of a training checkpoint")
    flags.DEFINE_string("width", "1", "width multiplier of the network, such as 0.5 or 4/5")
    flags.DEFINE_string(
        "class_names", None, "text file with one class name per line, or JSON; those of --data if not given"
    )
    flags.DEFINE_string("data", "imagenet2012", "data set that the network was trained for")
    flags.DEFINE_integer("image_size", None, "height and width of its input; 224, or an EfficientNet's own")
    flags.DEFINE_enum("fit", "crop", ["native", "stretch", "crop"], "how images are brought to that size")
    flags.DEFINE_list("mean", ["0.485", "0.456", "0.406"], "subtracted from images scaled to [0, 1]")
    flags.DEFINE_list("std", ["0.229", "0.224", "0.225"], "by which the result is divided")
    flags.DEFINE_enum("padding", None, ["even", "same"], "of EfficientNet; its library's if not given")
    flags.DEFINE_float("batch_norm_epsilon", None, "that of the library's network if not given")


def main() -> None:
    """Run the command."""
    if FLAGS.model not in models.MODELS:
        raise UserError(f"--model={FLAGS.model} is unknown{nearest(FLAGS.model, models.MODELS)}")
    for flag in ("weights", "output"):
        if not FLAGS[flag].value:
            raise UserError(f"--{flag}= is empty")
    output, weights = pathlib.Path(FLAGS.output), pathlib.Path(FLAGS.weights)
    check_output(output)
    names = read_class_names(pathlib.Path(FLAGS.class_names)) if FLAGS.class_names else ()
    preprocessing = Preprocessing(_numbers("mean"), _numbers("std"), FLAGS.fit, _image_size())
    if 0 in preprocessing.std or min(preprocessing.std) < 0:
        raise UserError(f"--std={','.join(FLAGS.std)} must be above 0")
    request = Request(
        model=FLAGS.model,
        input_shape=(preprocessing.image_size, preprocessing.image_size, 3),
        options=_options(weights),
        students=_students(),
        two_classes=len(names) == 2,
    )
    official = is_official(weights)
    states = _read_official(weights) if official else [read_state_dict(weights, FLAGS.ema)]
    if len(states) > 1:
        request = dataclasses.replace(request, students=len(states))
    found = convert_students(request, [state.arrays for state in states])
    names, about_names = _class_names(names, found[0].network.num_classes)
    provenance = Provenance(data=FLAGS.data, converted_from=weights.name)
    students = [
        LoadedStudent(_description(one, number, names, preprocessing, provenance), one.variables)
        for number, one in enumerate(found, 1)
    ]
    notes = "; ".join((*states[0].notes, *_notes(found[0]), about_names))
    if len(students) > 1:
        write_students(output, {f"student_{one.description.student}": one for one in students})
        print(
            f"{weights} -> {output}/student_1 to student_{len(students)}: {FLAGS.model}, {len(names)} classes; {notes}"
        )
        return
    write_student(output, students[0])
    parameters = f"{found[0].parameters:,} parameters"
    print(f"{weights} -> {output}: {FLAGS.model}, {len(names)} classes, {parameters}; {notes}")


def _read_official(weights: pathlib.Path) -> list[StateDict]:
    if FLAGS.ema:
        raise UserError("--ema: the official code's files hold no averaged weights; leave the flag out")
    states = read_official(weights)
    if len(states) > 1 and Fraction(_students()[0]) != 1:
        raise UserError(
            f"--width={FLAGS.width} is for a single network; {len(states)} students have their own widths"
        )
    return states


def _description(
    one: Converted,
    number: int,
    names: tuple[str, ...],
    preprocessing: Preprocessing,
    provenance: Provenance,
) -> StudentDescription:
    return StudentDescription(
        network=one.network,
        student=number,
        parameters=one.parameters,
        macs=one.macs,
        class_names=names,
        preprocessing=preprocessing,
        provenance=provenance,
    )


def _class_names(given: tuple[str, ...], classes: int) -> tuple[tuple[str, ...], str]:
    """Return the names in --class_names, those of --data or numbers; and which they are, for people."""
    if given:
        if len(given) != classes:
            raise UserError(
                f"--class_names={FLAGS.class_names} has {len(given)} names, the network {classes} classes"
            )
        return given, f"class names of {FLAGS.class_names}"
    known = known_class_names(FLAGS.data)
    if len(known) == classes:
        return known, f"class names of {FLAGS.data}"
    why = f"{FLAGS.data} has {len(known)}" if known else f"those of {FLAGS.data} are not known"
    return tuple(
        map(str, range(classes))
    ), f"classes are named 0 to {classes - 1} ({why}; see --class_names)"


def _notes(found: Converted) -> list[str]:
    """Return the library whose names fit, the settings that it implies, and what was left out."""
    options = ", ".join(f"{name}={value}" for name, value in found.network.options.items())
    notes = [f"arrays are named as in {found.library}" + (f" ({options})" if options else "")]
    if found.auxiliary:
        heads = sorted({name.partition(".")[0] for name in found.auxiliary})
        notes.append(f"arrays of auxiliary heads were left out: {', '.join(heads)}")
    return notes


def _options(weights: pathlib.Path) -> dict[str, Any]:
    """Return the settings of the network that flags give.

    Raises:
        UserError: it does not have them, or they are needed and missing.
    """
    efficientnet = FLAGS.model.startswith("efficientnet")
    if FLAGS.padding and not efficientnet:
        raise UserError(
            f"--padding={FLAGS.padding}: only EfficientNets have it, not {FLAGS.model}; leave it out"
        )
    if efficientnet and not FLAGS.padding and re.search(r"(^|\W)tf_", weights.name):
        raise UserError(
            f"--weights={weights}: timm's tf_ networks need --padding=same --batch_norm_epsilon=0.001; pass "
            f"--padding=even if it is none of them"
        )
    epsilon = FLAGS.batch_norm_epsilon
    if epsilon is not None and not 0 < epsilon < 1:
        raise UserError(f"--batch_norm_epsilon={epsilon:g} must be between 0 and 1")
    flagged = {"padding": FLAGS.padding, "batch_norm_epsilon": epsilon}
    return {name: value for name, value in flagged.items() if value is not None}


def _students() -> tuple[Any, ...]:
    """Return the student that --width asks for, as `models.build_ensemble` takes it."""
    try:
        width = Fraction(FLAGS.width)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--width={FLAGS.width} must be a number, such as 0.5 or 4/5") from error
    if not 0 < width <= 16:
        raise UserError(f"--width={FLAGS.width} must be above 0 and at most 16")
    return (1,) if width == 1 else (str(width),)


def _image_size() -> int:
    """Return --image_size, or the size that the network was published with."""
    size = FLAGS.image_size
    if size is None:
        own = re.fullmatch(r"efficientnet_b([0-7])", FLAGS.model)
        return EFFICIENTNET_SIZES[int(own[1])] if own else 224
    if not 1 <= size <= LARGEST_IMAGE:
        raise UserError(f"--image_size={size} must be between 1 and {LARGEST_IMAGE}")
    return int(size)


def _numbers(flag: str) -> tuple[float, ...]:
    """Return the numbers in a flag such as --mean=0.485,0.456,0.406: one, or one per channel."""
    given: Any = FLAGS[flag].value
    try:
        numbers = tuple(float(value) for value in given)
    except ValueError as error:
        raise UserError(f"--{flag}={','.join(given)} must be numbers separated by commas") from error
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"--{flag}={','.join(given)} must be one finite number, or one for each of 3 channels"
        )
    return numbers


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
