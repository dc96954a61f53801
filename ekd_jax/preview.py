"""Draws what the model sees: python -m ekd_jax.preview --config=... --output=grid.png

A row an example: as stored, then as it comes in several epochs, augmented and normalized and turned
back into colors. Under each the label that the loss is given.
"""

import pathlib

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError, reason
from ekd_jax.data.grid import preview
from ekd_jax.data.opening import open_data

FLAGS = flags.FLAGS


def main() -> None:
    """The command."""
    config = cli.config()
    output = pathlib.Path(FLAGS.output)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output={output} must end in .png")
    data = open_data(config)
    grid = preview(config, data, min(FLAGS.examples, len(data.train)), FLAGS.epochs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        grid.save(output)
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {reason(error)}") from error
    print(f"{output}: {grid.width}x{grid.height} pixels")


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("output", None, "file to write, .png", required=True)
    flags.DEFINE_integer("examples", 6, "rows", lower_bound=1)
    flags.DEFINE_integer("epochs", 7, "columns beside the image as stored", lower_bound=1)
    cli.run(main)
