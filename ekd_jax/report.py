"""Write a report on runs: one HTML page, the same as Markdown, and its figures as SVG.

    python -m ekd_jax.report RUN [RUN ...] --output=DIR [--nopredictions] [--figures=png,pdf]

RUN is a directory of `ekd train`, or one of several seeds or of `ekd compare`, which stands for all runs in it. A run
may still be training, or have no baselines beside it: a part that cannot be had is left out, and the page says why.
Runs that differ in their seed alone are one row, with mean and standard deviation. All runs must be of the same data.

DIR/report.html needs no other file, no network and no scripts. --figures=png,pdf writes each figure in these formats,
too, with matplotlib (pip install 'ekd_jax[figures]'). docs/reporting.md explains the numbers.
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
    flags.DEFINE_list("figures", [], "formats of the figures besides SVG: png, pdf; they need matplotlib")


def main(runs: list[str]) -> None:
    """Run the command."""
    if not runs:
        raise UserError("name at least one run: ekd report RUN --output=DIR")
    output = pathlib.Path(FLAGS.output)
    document = write_report(runs, output, FLAGS.predictions, FLAGS.figures)
    missing = [part for section in document.sections for part in section.parts if isinstance(part, Missing)]
    for part in missing:
        print(f"left out: {part.what}: {part.reason}")
    print(f"{output / PAGE} and {MARKDOWN}: {len(document.figures)} figures")


if __name__ == "__main__":
    cli.run(sys.modules[__name__])
