"""Keep results of complete runs, and write the tables of README and documents from them.

    python benchmarks/tables.py keep RUNS --name=digits --command="python -m ekd_jax.main ..."
    python benchmarks/tables.py write

`keep` copies the summaries of a run, or of a directory of runs, to benchmarks/results/NAME, with the command and the
versions. `write` puts every table between its marks, `<!-- results: NAME -->` and `<!-- end of results -->`;
tests/test_tables.py fails where a document differs from what is kept.
"""

import json
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from ekd_jax.api import load_recipe
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.files import write_bytes, write_json
from ekd_jax.common.records import read_record
from ekd_jax.common.spread import spread
from ekd_jax.common.text import markdown_table
from ekd_jax.runs.records import A_RUN, ENVIRONMENT, SUMMARY, Result, Summary
from ekd_jax.training.comparison import entries
from ekd_jax.training.comparison_table import as_markdown, compare
from ekd_jax.training.report import summary_table

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ABOUT = "about.json"
DOCUMENTS = ("README.md", "docs/results.md", "docs/methods.md", "docs/performance.md")
PLACE = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

FLAGS = flags.FLAGS
flags.DEFINE_string("name", None, "of the results to keep; they replace those of this name")
flags.DEFINE_string("command", None, "the command that trained them")


def keep(runs: pathlib.Path, name: str, command: str) -> int:
    """Copy what is small and complete of a run, or of a directory of runs, and return how many runs there are.

    Raises:
        UserError: there is none, or they were trained by different versions or devices.
    """
    summaries = sorted(runs.rglob(SUMMARY))
    if not summaries:
        raise UserError(f"{runs} holds no complete run")
    fields = ("python", "jax", "jaxlib", "devices")
    versions = {
        tuple(process[field] for field in fields)
        for file in summaries
        for process in json.loads((file.parent / ENVIRONMENT).read_text())
    }
    if len(versions) > 1:
        raise UserError(
            f"the runs in {runs} were trained by different versions or devices: {sorted(versions)}"
        )
    target = RESULTS / name
    if target.exists():
        shutil.rmtree(target)
    for file in summaries:
        write_bytes(target / file.relative_to(runs), file.read_bytes())
    write_json(target / ABOUT, {"command": command, **dict(zip(fields, versions.pop(), strict=True))})
    return len(summaries)


# --- tables --------------------------------------------------------------------------------------


def _summaries(name: str) -> dict[int, Summary]:
    """Return the summaries of a directory of seeds, by seed.

    Raises:
        UserError: nothing is kept.
    """
    read = [read_record(file, Summary, A_RUN) for file in (RESULTS / name).glob(f"seed*/{SUMMARY}")]
    if not read:
        raise UserError(f"{RESULTS / name} has no results: keep some")
    return {summary.seed: summary for summary in sorted(read, key=lambda summary: summary.seed)}


def _about(name: str) -> str:
    """Return the command that trained some runs, and on what."""
    about = json.loads((RESULTS / name / ABOUT).read_text())
    return (
        f"```\n{about['command']}\n```\n\nJAX {about['jax']}, Python {about['python']}, {about['devices']}."
    )


def one_seed(name: str, seed: int) -> str:
    """Return the table that a run prints at its end, without its times."""
    text = summary_table(_summaries(name)[seed]).rpartition("\n")[0]
    return f"```\n{text}\n```"


def over_seeds(name: str) -> str:
    """Return a table of students with mean and standard deviation over seeds, last epoch and best."""
    summaries = _summaries(name)
    runs = list(summaries.values())

    def row(about: list[str], results: Sequence[Result]) -> list[str]:
        return [
            *about,
            str(spread(r.top1_last for r in results)),
            str(spread(r.top1_best for r in results)),
        ]

    rows = [
        row([str(s[0].student), s[0].width, f"{s[0].parameters:,}", f"{100 * s[0].ratio:.1f}"], s)
        for s in zip(*(run.students for run in runs), strict=True)
    ]
    rows.append(row(["ensemble teacher", "", "", ""], [run.ensemble for run in runs]))
    header = ["student", "width", "parameters", "% of 1", "top-1 last", "top-1 best"]
    seeds = ", ".join(map(str, summaries))
    return f"{_about(name)} n = {len(runs)} seeds ({seeds}).\n\n{markdown_table(rows, header)}"


def comparison(name: str, recipe: str) -> str:
    """Return the table of `ekd compare`."""
    about = json.loads((RESULTS / name / ABOUT).read_text())
    runs = entries(load_recipe(ROOT / recipe), RESULTS / name)
    return as_markdown(compare(runs), about["command"]).rstrip()


def compiled(name: str) -> str:
    """Return the table of programs that `benchmarks/targets.py` compiled: kernels by part, bytes, and a bound."""
    found = json.loads((RESULTS / "targets" / f"{name}.json").read_text())
    parts = list(dict.fromkeys(part for row in found["rows"] for part in row["parts"]))
    names = [
        f"{row['model']} x {row['students']}" + (f", {row['execution']}" if row["students"] > 1 else "")
        for row in found["rows"]
    ]

    def line(about: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [about, *map(cell, found["rows"])]

    rows = [line("kernels", lambda row: f"{row['kernels']:,}")]
    rows += [
        line(f"... {part}", lambda row, part=part: f"{row['parts'].get(part, [0])[0]:,}") for part in parts
    ]  # type: ignore[misc]
    rows += [
        line("MB read and written", lambda row: f"{row['bytes'] / 1e6:,.0f}"),
        line("GFLOP", lambda row: f"{row['flops'] / 1e9:,.0f}"),
        line("MB temporary", lambda row: f"{row['temporary_bytes'] / 1e6:,.0f}"),
        *(
            line(f"ms at least, by {by}", lambda row, by=by: f"{1e3 * row['bounds'][by]:.2f}")  # type: ignore[misc]
            for by in found["rows"][0]["bounds"]
        ),
    ]
    about = (
        f"```\n{found['command']}\n```\n\nJAX {found['jax']}, Python {found['python']}; compiled, not run."
    )
    return f"{about}\n\n{markdown_table(rows, ['a step', *names])}"


TABLES: dict[str, Callable[[], str]] = {
    "digits_seed0": lambda: one_seed("digits", 0),
    "digits": lambda: over_seeds("digits"),
    "methods": lambda: comparison("methods", "configs/compare_digits.py"),
    "h100": lambda: compiled("h100"),
}


def written(text: str) -> str:
    """Return a document with every table as it is now.

    Raises:
        UserError: a mark names a table that does not exist.
    """

    def filled(place: re.Match[str]) -> str:
        start, name, end = place.groups()
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}{nearest(name, TABLES)}")
        return f"{start}\n{TABLES[name]()}\n\n{end}"

    return PLACE.sub(filled, text)


def main(argv: list[str]) -> None:
    """Run the command."""
    match argv[1:]:
        case ["keep", runs] if FLAGS.name and FLAGS.command:
            print(
                f"kept {keep(pathlib.Path(runs), FLAGS.name, FLAGS.command)} runs in {RESULTS / FLAGS.name}"
            )
        case ["write"]:
            for name in DOCUMENTS:
                file = ROOT / name
                file.write_text(written(file.read_text()))
        case _:
            raise UserError(
                "call it as in its docstring: keep RUNS --name=NAME --command=COMMAND, or write"
            )


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
