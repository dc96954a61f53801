"""Weights & Biases or trackio, by option: the records of metrics.jsonl under the same names.

They repeat metrics.jsonl, so one that fails ends nothing. Both work without a network. Weights & Biases is offline
unless the user has logged in, and `wandb sync RUN/wandb/offline-run-*` sends the records later. trackio keeps them on
this machine.
"""

import contextlib
import importlib
import importlib.util
import io
import netrc
import os
import pathlib
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import write_json
from ekd_jax.common.log import logger
from ekd_jax.common.records import read_json
from ekd_jax.runs.records import A_RUN, TRACKER

PROJECT = "ekd_jax"


def check_tracker(name: str) -> None:
    """Raise UserError if the package of a tracker is not installed; an empty name is none."""
    if name and importlib.util.find_spec(name) is None:
        raise UserError(
            f"train.tracker={name} needs the package {name}: pip install 'ekd_jax[{name}]', or leave it out"
        )


class Tracker:
    """A run of Weights & Biases or of trackio; one that resumes goes on in the same.

    Args:
        name: "wandb" or "trackio".
        path: directory of the run.
        config: its configuration, shown beside the curves.
    """

    def __init__(self, name: str, path: pathlib.Path, config: Mapping[str, Any]):
        self._name: str = name
        self._run: Any = None
        with self._not_essential():
            module: Any = importlib.import_module(name)
            own = {"project": os.environ.get(f"{name.upper()}_PROJECT", PROJECT), "config": dict(config)}
            if name == "wandb":
                own |= {"dir": str(path), "id": _identifier(path), "resume": "allow", "name": path.name}
                own |= {
                    "mode": os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline"),
                    "settings": module.Settings(silent=True, console="off", init_timeout=30),
                }
            else:
                own |= {"name": f"{path.name}-{_identifier(path)}", "resume": "allow"}
            self._run = module.init(**own)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        if self._run is not None:
            with self._not_essential():
                self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish; what is not sent yet is sent."""
        if self._run is not None:
            with self._not_essential():
                self._run.finish()
            self._run = None

    @contextlib.contextmanager
    def _not_essential(self) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # trackio prints, where our results go
                yield
        except Exception as error:  # another's code, and a network
            self._run = None
            logger.warning(f"{self._name} fails ({reason(error)}): training goes on without it")


def _identifier(path: pathlib.Path) -> str:
    """Return the name of a run among those of its tracker; made when the run is first tracked."""
    file = path / TRACKER
    if not file.exists():
        write_json(file, {"id": uuid.uuid4().hex[:8]})
    return str(read_json(file, A_RUN)["id"])


def _logged_in() -> bool:
    """Return whether Weights & Biases can be reached without asking for a key, which would wait for an answer."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return bool(host and netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    return False
