"""The tables of a search, for a terminal and for a document."""

import shlex
from collections.abc import Mapping
from typing import Any

from ekd_jax.common.text import markdown_table, table
from ekd_jax.training.search_found import COMPLETE, FAILED, PRUNED, RUNNING, Found, Trial, in_words, short

MOST_ROWS = 30  # on a terminal


def train_command(found: Found, config: str, overridden: Mapping[str, Any], workdir: str) -> str:
    """Return the command that trains the best trial's configuration by itself; "" if no trial is complete.

    Args:
        found: by the search.
        config: what its `--config` was.
        overridden: knobs that its command line set, with their values.
        workdir: directory of the run.
    """
    if found.best is None:
        return ""
    knobs = {**overridden, **found.best.values}
    flags = [f"--config={config}", *(f"--config.{knob}={value}" for knob, value in knobs.items())]
    return shlex.join(["python", "-m", "ekd_jax.main", *flags, f"--workdir={workdir}"])


def as_text(found: Found, command: str) -> str:
    """Return the trials as a table for a terminal, and the command that trains the best one.

    Args:
        found: by the search.
        command: as `train_command` returns it.
    """
    rows, header = _rows(found)
    parts = [table(rows[:MOST_ROWS], header)] if rows else []
    if len(rows) > MOST_ROWS:
        parts.append(f"and {len(rows) - MOST_ROWS} more")
    parts += _explained(found)
    parts += [_line(trial) for state in (FAILED, PRUNED) for trial in found.in_state(state)[:MOST_ROWS]]
    parts += filter(None, [_not_finished(found), _importance(found)])
    if command:
        parts.append(f"to train the best knobs by themselves:\n  {command}")
    return "\n".join(parts)


def as_markdown(found: Found, search_command: str, command: str) -> str:
    """Return the trials as a document, with the commands that made it and that train the best one."""
    rows, header = _rows(found)
    first, *explained = _explained(found)
    parts = [f"{first}.", f"```\n{search_command}\n```"]
    if rows:
        parts.append(markdown_table(rows, header))
    parts += [f"{text.capitalize()}." for text in explained]
    if ended := [_line(trial) for state in (FAILED, PRUNED) for trial in found.in_state(state)]:
        parts.append("\n".join(f"* {line}" for line in ended))
    parts += [f"{text}." for text in (_not_finished(found), _importance(found)) if text]
    if command:
        parts.append(f"To train the best knobs by themselves:\n\n```\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def _rows(found: Found) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the complete trials, and the header."""
    last = [knob.rpartition(".")[2] for knob in found.space]
    names = [name if last.count(name) == 1 else knob for name, knob in zip(last, found.space, strict=True)]
    rows = [
        [str(trial.number), _objective(trial), *(short(trial.values[knob]) for knob in found.space)]
        for trial in found.in_state(COMPLETE)
    ]
    return rows, ["trial", found.objective, *names]


def _objective(trial: Trial) -> str:
    return f"{trial.objective:.2f}" + (f" ({trial.std:.2f})" if trial.std is not None else "")


def _explained(found: Found) -> list[str]:
    """Return sentences that say what the objective is, and why it is that."""
    what = "mean top-1 of the students" if found.objective == "mean" else f"top-1 of {found.objective}"
    seeds = f", mean of {len(found.seeds)} seeds (standard deviation)" if len(found.seeds) > 1 else ""
    about = (
        f"{found.model} on {found.data}, {found.method}, {found.epochs:g} epochs: {what} after the last epoch, per "
        f"cent of {found.validation_examples:,} validation images{seeds}"
    )
    if found.best is None:
        return [about]
    return [
        about,
        f"the highest of {len(found.in_state(COMPLETE))} is too high, because it was chosen: train the best knobs with "
        f"other seeds, and test that",
        "test accuracy is not shown, so that nothing is chosen by it",
    ]


def _line(trial: Trial) -> str:
    return f"trial {trial.number} {trial.state} ({in_words(trial.values)}): {trial.reason}"


def _not_finished(found: Found) -> str:
    numbers = ", ".join(str(trial.number) for trial in found.in_state(RUNNING))
    return f"not finished, or in training by another process: {numbers}" if numbers else ""


def _importance(found: Found) -> str:
    shares = ", ".join(f"{knob} {share:.0%}" for knob, share in found.importance.items())
    return f"importance for the best quarter (PED-ANOVA): {shares}" if shares else ""
