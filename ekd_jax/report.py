"""Write a report on runs: one HTML page, the same as Markdown, and its figures as SVG.

    python -m ekd_jax.report RUN [RUN ...] --output=DIR [--nopredictions]

RUN is a directory of `ekd train`, or of `ekd compare`, which stands for all its runs. A run may still be training, or
have no baselines beside it: a part that cannot be had is left out, and the page says why. Runs that differ in their
seed alone are one row, with mean and standard deviation. All runs must be of the same data.

DIR/report.html needs no other file, no network and no scripts. docs/reporting.md explains the numbers.
"""

import pathlib
import sys

from absl import flags

from ekd_jax import cli
from ekd_jax.common.errors import UserError
from ekd_jax.runs.report.document import Missing
from ekd_jax.runs.report.page import MARKDOWN, PAGE, write_report

FLAGS = flags.FLAGS
ARGUMENTS = "RUN"  # the command line may name directories without a flag


def define_flags() -> None:
    """Define the command's own flags."""
    flags.DEFINE_string("output", None, "new directory for the report", required=True)
    flags.DEFINE_boolean(
        "predictions", True, "predict the test images: for calibration, agreement, classes and Grad-CAM"
    )


def main(runs: list[str]) -> None:
    """Run the command."""
    if not runs:
        raise UserError("name at least one run: ekd report RUN --output=DIR")
    output = pathlib.Path(FLAGS.output)
    document = write_report(runs, output, FLAGS.predictions)
    missing = [part for section in document.sections for part in section.parts if isinstance(part, Missing)]
    for part in missing:
        print(f"left out: {part.what}: {part.reason}")
    print(f"{output / PAGE} and {MARKDOWN}: {len(document.figures)} figures")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
