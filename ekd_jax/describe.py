"""Describe the students of a recipe: parameters, multiply-accumulates, channels.

python -m ekd_jax.describe --config=configs/resnet_cifar100.py [--num_classes=K] [--json]
python -m ekd_jax.describe --config=configs/resnet_cifar100.py --arrays=5     # every array of student 5
"""

import json
import sys

from absl import flags
from clu import parameter_overview

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.records import as_json
from ekd_jax.config.build import Networks, build_networks
from ekd_jax.data.opening import known_facts
from ekd_jax.runs.describe import as_text, describe

FLAGS = flags.FLAGS
MAX_CLASSES = 1_000_000


def define_flags() -> None:
    """Define the command's own flags."""
    cli.define_config()
    flags.DEFINE_integer(
        "num_classes",
        None,
        "number of classes, instead of the data set's",
        lower_bound=2,
        upper_bound=MAX_CLASSES,
    )
    flags.DEFINE_integer("arrays", None, "list the parameter arrays of this student, from 1, instead")
    flags.DEFINE_boolean("json", False, "print JSON")


def main() -> None:
    """Run the command."""
    config = cli.config()
    known = known_facts(config)
    networks = build_networks(config, FLAGS.num_classes or known.num_classes, known.input_shape)
    if FLAGS.arrays is not None:
        print(_arrays_of(networks, FLAGS.arrays))
        return
    teachers = None if networks.method.has_teachers else ()  # they are not loaded here
    description = describe(networks, config.model.name, teachers)
    print(json.dumps(as_json(description), indent=2) if FLAGS.json else as_text(description))


def _arrays_of(networks: Networks, student: int) -> str:
    """Return a table of a student's parameter arrays."""
    number = len(networks.ensemble.students)
    if not 1 <= student <= number:
        raise UserError(f"--arrays={student}: there are students 1 to {number}")
    variables = networks.ensemble.student_variables(networks.trace.init(None), student)
    return str(parameter_overview.get_parameter_overview(variables["params"], include_stats=False))


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
