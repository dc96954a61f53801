"""Images for TensorBoard: figures of the report, and training images as the network sees them.

Drawing them takes seconds, so it happens only after evaluations: once in ten minutes, and at the end of a run
that has trained for a minute. They repeat what the report shows, so one that cannot be drawn ends nothing.
"""

import io
import time

import jax

from ekd_jax.common.errors import reason
from ekd_jax.common.log import logger
from ekd_jax.data.grid import draw_preview
from ekd_jax.runs.metrics import MetricWriter, read_metrics
from ekd_jax.runs.report.figure_files import can_draw, draw
from ekd_jax.runs.report.reading import Group, ReportedRun
from ekd_jax.runs.report.results import run_figures
from ekd_jax.runs.run import load_run
from ekd_jax.training.setup import Setup

OFTEN, LEAST = 600.0, 60.0  # seconds between two drawings, and of training before the last one
EXAMPLES, EPOCHS = 4, 4  # of the training images


class BoardImages:
    """Writes images of a run to TensorBoard; figures only where matplotlib is installed.

    Args:
        setup: of the run.
        writer: of its records; one without a directory, where another process writes, gets no images.
    """

    def __init__(self, setup: Setup, writer: MetricWriter):
        self._setup, self._writer = setup, writer
        self._begun = self._drawn = time.monotonic()
        self._sampled = False

    def after_evaluation(self, step: int, last: bool) -> None:
        """Write the images if it is time.

        Args:
            step: that was evaluated.
            last: whether the run is complete after it.
        """
        now = time.monotonic()
        if now - self._drawn >= OFTEN or (last and now - self._begun >= LEAST):
            self.write(step)
            self._drawn = time.monotonic()

    def write(self, step: int) -> None:
        """Write the images of a step."""
        if self._writer.path is None:
            return
        try:
            with jax.transfer_guard("allow"):
                self._writer.images(step, self._drawn_now())
        except Exception as error:  # another's code; training is worth more
            logger.warning(f"no images for TensorBoard: {reason(error)}")

    def _drawn_now(self) -> dict[str, bytes]:
        images = {}
        setup, path = self._setup, self._writer.path
        assert path is not None
        if not self._sampled:
            file = io.BytesIO()
            rows = min(EXAMPLES, len(setup.data.train))
            draw_preview(setup.config, setup.data, rows, EPOCHS).save(file, "PNG")
            images["data/augmented"] = file.getvalue()
            self._sampled = True
        if can_draw():
            run = ReportedRun(load_run(path), None, tuple(read_metrics(path, quiet=True)), "")
            for figure in run_figures(Group(setup.config.method.name, (run,))):
                images[f"report/{figure.key}"] = draw(figure, "png")
        return images
