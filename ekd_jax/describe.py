"""What a network is: parameters, multiply-accumulates and widths of its students; also a command.

python -m ekd_jax.describe --config=configs/resnet_cifar100.py [--num_classes=K] [--json]
"""

import json

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.data.opening import known_facts
from ekd_jax.runs.describe import as_text, describe

FLAGS = flags.FLAGS


def main() -> None:
    """The command."""
    config = cli.config()
    known = known_facts(config)
    if FLAGS.num_classes is not None and FLAGS.num_classes < 1:
        raise UserError(f"--num_classes={FLAGS.num_classes} must be at least 1")
    classes = FLAGS.num_classes or known.num_classes
    method, trace = make_method(config), make_ensemble(config, classes).trace(known.input_shape)
    teachers = None if method.has_teachers else ()  # they are not looked for
    description = describe(config, trace, method, teachers)
    print(json.dumps(description, indent=2) if FLAGS.json else as_text(description))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_integer("num_classes", None, "number of classes, instead of the data set's")
    flags.DEFINE_boolean("json", False, "print JSON")
    cli.run(main)
