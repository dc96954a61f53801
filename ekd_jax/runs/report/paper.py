"""The numbers of the ensemble method's paper that a run can be set beside.

Walawalkar, Shen, Savvides, "Online ensemble model compression using knowledge distillation", ECCV 2020: Tables 2, 3, 5
and 6 (accuracies) and Figure 2b (minutes on GTX 1080 Ti).
"""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from ml_collections import FrozenConfigDict

from ekd_jax.config.recipes import DATA
from ekd_jax.models.members import parse_students

TABLES = {"cifar10": 2, "cifar100": 3, "svhn": 5, "imagenet": 6}
STUDENTS = 5


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """The paper's results for a network and a data set.

    Attributes:
        table: number of the paper's table.
        epochs: how long the paper trains.
        alone: best top-1 in per cent of students 1 to 5, each trained alone; mean of 5 runs.
        ensemble: the same, trained in the ensemble.
        minutes: of one ensemble run, and of the students' separate runs in turn and in parallel.
    """

    table: int
    epochs: float
    alone: tuple[float, ...]
    ensemble: tuple[float, ...]
    minutes: tuple[float, float, float]


@functools.cache
def published() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return the paper's numbers: data set, as in `recipes.DATA`, network, and `alone`, `ensemble` and `minutes`."""
    text = (importlib.resources.files(__package__) / "paper.json").read_text()
    numbers: Any = json.loads(text)
    return dict(numbers)


def paper_row(config: FrozenConfigDict) -> PaperRow | None:
    """Return the paper's numbers for the setting of a run; None if it is none of the paper's.

    The setting is the network, the data set, all its training images, and five students of width 1, 0.8, 0.6, 0.4, 0.2.
    """
    section, usual = config.data, tuple(parse_students(STUDENTS))
    data = next((key for key, each in DATA.items() if each.name == section.name), "")
    whole = not (
        section.train_examples or section.validation_examples or section.test_split or section.extra
    )
    found = published().get(data, {}).get(config.model.name)
    if found is None or not whole or parse_students(config.model.students) != usual:
        return None
    turn, parallel, ensemble = found["minutes"][1], found["minutes"][2], found["minutes"][0]
    return PaperRow(
        TABLES[data],
        float(DATA[data].epochs),
        tuple(found["alone"]),
        tuple(found["ensemble"]),
        (ensemble, turn, parallel),
    )
