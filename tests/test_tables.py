"""Tables of README and documents, held together with the results that are kept."""

import json
import shutil

import pytest
import tables

from ekd_jax.common.errors import UserError


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_documents_have_the_tables_of_the_results(name):
    text = (tables.ROOT / name).read_text()
    assert tables.PLACE.search(text)
    assert tables.written(text) == text, "run: python benchmarks/tables.py write"


def test_every_table_has_one_place_and_every_result_a_table(tmp_path, monkeypatch):
    places = [
        place
        for name in tables.DOCUMENTS
        for place in tables.PLACE.findall((tables.ROOT / name).read_text())
    ]
    assert sorted(name for _, name, _ in places) == sorted(tables.TABLES)
    for name in [path.name for path in tables.RESULTS.iterdir()]:
        monkeypatch.setattr(tables, "RESULTS", tmp_path / "without" / name)
        shutil.copytree(tables.ROOT / "benchmarks" / "results", tables.RESULTS)
        shutil.rmtree(tables.RESULTS / name)
        with pytest.raises((OSError, UserError)):
            [table() for table in tables.TABLES.values()]


def test_a_result_that_changes_changes_the_table(tmp_path, monkeypatch):
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    file = tmp_path / "results" / "digits" / "seed0" / "summary.json"
    summary = json.loads(file.read_text())
    summary["ensemble"]["top1_last"] = 12.34
    file.write_text(json.dumps(summary))
    text = (tables.ROOT / "README.md").read_text()
    changed = tables.written(text)
    assert changed != text
    assert "12.34" in changed


def test_what_is_kept(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    runs = tmp_path / "runs"
    for seed in (0, 1):
        shutil.copytree(finished[0], runs / f"seed{seed}", ignore=shutil.ignore_patterns("checkpoints"))
    for _ in range(2):  # the second time they are replaced
        assert tables.keep(runs, "tiny", "the command") == 2
    assert json.loads((tables.RESULTS / "tiny" / "about.json").read_text())["command"] == "the command"
    assert (tables.RESULTS / "tiny" / "seed1" / "summary.json").read_text() == (
        finished[0] / "summary.json"
    ).read_text()

    environment = runs / "seed1" / "environment.json"
    processes = json.loads(environment.read_text())
    environment.write_text(json.dumps([{**processes[0], "jax": "0.0.1"}]))
    with pytest.raises(UserError, match="were trained by different versions or devices: .*0\\.0\\.1"):
        tables.keep(runs, "tiny", "the command")
    with pytest.raises(UserError, match="holds no complete run"):
        tables.keep(tmp_path / "nowhere", "tiny", "the command")
    assert (tables.RESULTS / "tiny" / "seed1").exists()


def test_a_mark_of_no_table():
    with pytest.raises(UserError, match="there is no table 'digitz'; did you mean 'digits'"):
        tables.written("<!-- results: digitz -->\n<!-- end of results -->")
