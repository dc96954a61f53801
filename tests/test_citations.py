"""Whatever the repository refers to is in the repository: files, headings, and the knobs of the reference."""

import pathlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from ekd_jax.config.knobs import KNOBS
from ekd_jax.methods import METHODS
from ekd_jax.methods.base import knobs_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs/reference"
PLACES = ("ekd_jax", "configs", "tests", "docs", "benchmarks", "launch", ".ci", "*.md", "*.toml")
SUFFIXES = (".py", ".md", ".toml", ".sh", ".sbatch", ".yaml", "")

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
# A path below the repository's root, as in `docs/reference/one.md#ramp-up` or ekd_jax/methods/one.py.
CITATION = re.compile(
    r"(?<![\w/.-])((?:docs|ekd_jax|configs|benchmarks|tests|launch)/[\w./-]*\.(?:md|py|sh|sbatch|yaml|npz))"
    r"(?:#([\w-]+))?"
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
OLD = re.compile(r"METHODS(\.md|\s+D?\d)")  # a specification that was never in the repository


class Problem(NamedTuple):
    """A reference that does not resolve."""

    file: str
    line: int
    text: str
    reason: str


def files(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the text files of a repository that may refer to something."""
    found = [path for place in PLACES for path in root.glob(place)]
    found += [path for directory in found if directory.is_dir() for path in directory.rglob("*")]
    # This file names files that do not exist.
    found = [path for path in found if path.is_file() and path.name != pathlib.Path(__file__).name]
    return sorted({path for path in found if path.suffix in SUFFIXES})


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: pathlib.Path) -> set[str]:
    """Return the anchors of a Markdown file: its headings, numbered where they repeat, and its `<a id=...>`."""
    text = FENCE.sub("", path.read_text())
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE):
        base, number = slug(heading), 0
        while (anchor := f"{base}-{number}" if number else base) in found:
            number += 1
        found.add(anchor)
    return found


def targets(path: pathlib.Path, root: pathlib.Path) -> Iterator[tuple[int, str, pathlib.Path, str]]:
    """Yield what a file refers to: the place in its text, the reference, the path meant, and the anchor."""
    text = path.read_text()
    for match in CITATION.finditer(text):
        made_up = (root / "tests") in path.parents and not match[1].endswith(".md")
        if not made_up:
            yield match.start(), match[0], root / match[1], match[2] or ""
    if path.suffix == ".md":
        for match in LINK.finditer(FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)):
            file, _, anchor = urllib.parse.unquote(match[1]).partition("#")
            if not re.match(r"[a-z]+:", file):
                yield match.start(), match[1], path.parent / file if file else path, anchor


def problems(root: pathlib.Path) -> list[Problem]:
    """Return all references of a repository that do not resolve."""
    found = []
    for path in files(root):
        text = path.read_text()
        places = [(match.start(), match[0], "not in the repository") for match in OLD.finditer(text)]
        for start, what, target, anchor in targets(path, root):
            if not target.exists():
                places.append((start, what, "there is no such file"))
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                places.append((start, what, "there is no such heading"))
        name = str(path.relative_to(root))
        found += [Problem(name, text.count("\n", 0, start) + 1, *rest) for start, *rest in places]
    return found


def test_every_reference_resolves():
    assert not problems(ROOT), "\n".join(f"{p.file}:{p.line}: {p.text}: {p.reason}" for p in problems(ROOT))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("ekd_jax/a.py", '"""As in docs/reference/one.md#loss."""', ""),
        ("ekd_jax/a.py", '"""As in docs/reference/one.md#los."""', "heading"),
        ("ekd_jax/a.py", "# docs/reference/two.md#loss", "file"),
        ("configs/a.py", '"""Constants as in ekd_jax/b.py."""', "file"),
        ("configs/a.py", '"""As in METHODS.md 2."""', "repository"),
        ("configs/a.py", '"""As in METHODS D2."""', "repository"),
        ("configs/a.py", "from ekd_jax.methods import METHODS  # docs/reference/one.md", ""),
        ("docs/a.md", "[ONE](reference/one.md#the-loss-1) and [image](https://a.b/c.png)", ""),
        ("docs/a.md", "[ONE](reference/one.md#d1), [here](#a-b)\n\n## A: b", ""),
        ("docs/a.md", "[ONE](reference/one.md#the-loss-2)", "heading"),
        ("docs/a.md", "[ONE](one.md)", "file"),
        ("docs/a.md", "[here](#c)\n\n```\n# c\n```", "heading"),
        ("docs/a.md", "```\n[ONE](one.md)\n```", ""),
        ("README.md", "![picture](docs/images/none.png)", "file"),
        ("pyproject.toml", "# docs/none.md", "file"),
        (".ci/run", "# docs/none.md", "file"),
    ],
)
def test_the_check_itself(tmp_path, name, text, reason):
    reference = tmp_path / "docs/reference/one.md"
    reference.parent.mkdir(parents=True)
    reference.write_text('# ONE\n\n## Loss\n\n## The `loss`\n\n## The *loss*\n\n| <a id="d1"></a>D1 |\n')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    found = problems(tmp_path)
    assert [p.file for p in found] == [name] * bool(reason)
    assert all(reason in p.reason for p in found)


def methods_of(page: str) -> list[str]:
    """Return the names in the rows of the reference's index that link to a page; "" stands for any page."""
    index = (REFERENCE / "README.md").read_text()
    link = re.escape(page) if page else r"\w+\.md"
    rows = re.findall(rf"^\| \[[^]]+\]\({link}(?:#[\w-]+)?\) \| (.+?) \|", index, re.MULTILINE)
    return re.findall(r"`(\w+)`", " ".join(rows))


def test_the_reference_has_a_row_for_every_method():
    own = [name for name, method in METHODS.items() if method.__module__.startswith("ekd_jax.")]
    assert sorted(methods_of("")) == sorted(own)  # other tests may have registered methods of theirs


@pytest.mark.parametrize("page", [path.name for path in sorted(REFERENCE.glob("*.md"))])
def test_knobs_of_the_reference_are_those_of_the_code(page):
    """Every knob that a page names exists, and its tables of knobs have the defaults of its methods."""
    text = (REFERENCE / page).read_text()
    defaults: dict[str, set[str]] = {}
    for method in methods_of(page) or METHODS:
        for field, knob in knobs_of(METHODS[method]).items():
            defaults.setdefault(f"method.{field}", set()).add(str(knob.default))
    named = re.findall(r"`((?:method|model|data|optimizer|train)\.(?!name\b|py\b|lua\b)\w+\b)(?!\()", text)
    assert not set(named) - KNOBS.keys() - defaults.keys()
    for knob, default in re.findall(r"^\| `(method\.\w+)` \| `([^`]+)` \|", text, re.MULTILINE):
        assert default in defaults[knob], knob
