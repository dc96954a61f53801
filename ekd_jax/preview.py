"""Draw the images that the network sees.

    python -m ekd_jax.preview --config=configs/resnet_cifar100.py --output=grid.png

One row per example: as stored, then as it is in several epochs, augmented, normalized and turned back into
colors. Below each image is the label that the loss gets.
"""

import io
import pathlib
import sys

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.common.files import why_not_writable, write_bytes
from ekd_jax.data.grid import draw_preview
from ekd_jax.data.opening import open_data

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's own flags."""
    cli.define_config()
    flags.DEFINE_string("output", None, "file to write, .png", required=True)
    flags.DEFINE_integer("examples", 6, "number of rows", 1, 1000)
    flags.DEFINE_integer("epochs", 7, "number of columns besides the image as stored", 1, 1000)


def main() -> None:
    """Run the command."""
    config = cli.config()
    output = pathlib.Path(FLAGS.output)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output={output} must end in .png")
    if why := why_not_writable(output):
        raise UserError(f"--output={output}: {why}: choose another")
    data = open_data(config)
    grid = draw_preview(config, data, min(FLAGS.examples, len(data.train)), FLAGS.epochs)
    file = io.BytesIO()
    grid.save(file, "PNG")
    try:
        write_bytes(output, file.getvalue())
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error.strerror}") from error
    print(f"{output}: {grid.width}x{grid.height} pixels")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
