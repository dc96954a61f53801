"""The command `ekd`, also `python -m ekd_jax`: lists the commands, and runs one."""

import importlib
import sys
from collections.abc import Sequence

# command -> its module, and what it does
COMMANDS = {
    "train": ("ekd_jax.main", "Train a family of students, or resume training."),
    "status": ("ekd_jax.status", "Show how far a run is, how good and how fast, also from elsewhere."),
    "compare": ("ekd_jax.compare", "Compare methods on the same network, data, epochs and seeds."),
    "search": ("ekd_jax.search", "Search for good knobs with Optuna, by accuracy on validation images."),
    "extract": ("ekd_jax.extract", "Extract one student of a run, as a directory that stands alone."),
    "export": (
        "ekd_jax.export",
        "Export students for ONNX Runtime, OpenVINO, PyTorch, JAX or a browser.",
    ),
    "benchmark": (
        "ekd_jax.benchmark",
        "Measure latency, throughput and memory of students in each runtime.",
    ),
    "choose": (
        "ekd_jax.choose",
        "Choose the best student of a run within limits, and extract or export it.",
    ),
    "evaluate": ("ekd_jax.evaluate", "Evaluate a run or an extracted student on the test set."),
    "report": ("ekd_jax.report", "Write a report on runs: a page, Markdown and figures."),
    "predict": ("ekd_jax.predict", "Ask an extracted student what is in an image."),
    "describe": ("ekd_jax.describe", "List the students of a recipe: parameters, multiply-accumulates."),
    "convert": ("ekd_jax.convert", "Make a student of PyTorch weights."),
    "prepare": ("ekd_jax.prepare", "Prepare a data set before anything is trained on it."),
    "preview": ("ekd_jax.preview", "Draw the images that the network sees."),
    "knobs": ("ekd_jax.catalog", "List the knobs of a configuration: default, meaning, allowed values."),
    "models": ("ekd_jax.catalog", "List the networks, with their parameters."),
    "methods": ("ekd_jax.catalog", "List the training methods, with their sources."),
}


def overview() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  ekd {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "ekd: a family of compressed image classifiers from one training run\n\n"
        + "\n".join(lines)
        + "\n\n`ekd COMMAND --help` explains one. Example: ekd train --config=configs/digits.py"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name."""
    name, *rest = (sys.argv[1:] if arguments is None else [*arguments]) or ["--help"]
    if name in ("--help", "-h", "help", "--version"):
        from ekd_jax.version import __version__

        _show(f"ekd_jax {__version__}" if name == "--version" else overview())
        return
    if name not in COMMANDS:
        from ekd_jax.common.errors import nearest

        print(f"error: there is no command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(COMMANDS[name][0])
    if COMMANDS[name][0] == "ekd_jax.catalog":
        module.run(name, rest)
        return
    from ekd_jax import cli

    cli.run(module, rest, f"ekd {name}")


def _show(text: str) -> None:
    """Print a text; JAX is loaded only where that fails, as on a full disk."""
    try:
        print(text, flush=True)
    except OSError:
        from ekd_jax import cli

        cli.guarded(lambda: print(text))


if __name__ == "__main__":
    main()
