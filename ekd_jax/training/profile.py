"""A trace of some training steps, for XProf and Perfetto."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.log import logger

FOLDER = "profile"
WARM_UP = 10  # steps before the trace: in the first ones memory is taken and caches are filled
MOST = 1000  # steps: a trace of more is too large to look at


class Profile:
    """Traces steps of a run by JAX's profiler, one dispatch for each step so that they can be told apart.

    Which steps are one dispatch does not change what is computed. Of several processes all keep to the same steps, and
    process 0 writes its trace.

    Args:
        steps: how many to trace; 0: none.
        folder: where the trace is written.
    """

    def __init__(self, steps: int = 0, folder: pathlib.Path = pathlib.Path(FOLDER)):
        self.steps, self.folder = steps, folder
        self.active, self._writes = False, False
        self._first = self._last = -1

    def plan(self, step: int, last: int) -> None:
        """Plan the trace for a run that goes on from a step.

        Args:
            step: number of steps taken.
            last: of the whole run.

        Raises:
            UserError: there are not as many steps left.
        """
        if not self.steps:
            return
        self._first, self._last = step + WARM_UP, step + WARM_UP + self.steps
        if self._last > last:
            raise UserError(
                f"--profile={self.steps}: with {WARM_UP} steps to warm up, these are more than the {last - step:,} "
                f"that are left of the run: ask for fewer, or for more epochs"
            )

    def boundaries(self, step: int) -> list[int]:
        """Return the later steps at which the trace begins or ends."""
        return [boundary for boundary in (self._first, self._last) if boundary > step]

    def reach(self, step: int) -> None:
        """Begin or end the trace, if that is due at this step; all devices have finished it."""
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would fill the file
            self.active = True
            if parallel.is_main():
                with self._not_essential():
                    jax.profiler.start_trace(
                        self.folder, create_perfetto_trace=True, profiler_options=options
                    )
                    self._writes = True
        elif step == self._last:
            self.close()

    def close(self) -> None:
        """End the trace, if it runs, and write it."""
        if not self.active:
            return
        self.active, first = False, self._first
        self.steps, self._first, self._last = 0, -1, -1
        if not self._writes:
            return
        self._writes = False
        with self._not_essential():
            jax.profiler.stop_trace()
            logger.info(
                f"a trace from step {first + 1:,} on is in {self.folder}: "
                f"xprof --logdir={self.folder}, or open perfetto_trace.json.gz at ui.perfetto.dev"
            )

    @contextlib.contextmanager
    def _not_essential(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            logger.warning(f"no trace is written ({reason(error)}): training goes on")
