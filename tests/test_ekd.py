"""The command `ekd`: its list, its help and its catalogs, as a user types them."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, plain_environment

from ekd_jax import catalog
from ekd_jax.__main__ import COMMANDS, overview
from ekd_jax.common.errors import UserError
from ekd_jax.config.knobs import KNOBS
from ekd_jax.methods import list_methods
from ekd_jax.models import list_models


def ekd(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ekd_jax", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=plain_environment(),
        timeout=120,
    )


def test_every_command_is_listed_without_starting_jax():
    done = ekd()
    assert done.returncode == 0
    assert done.stdout == overview() + "\n"
    assert set(re.findall(r"^  ekd (\w+)", done.stdout, re.M)) == COMMANDS.keys()
    code = "import sys, ekd_jax.__main__ as m; m.main(['--help']); print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", ["train", "convert", "knobs"])
def test_help_says_what_a_command_does_and_takes(name):
    done = ekd(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ekd {name}")
    wanted = {"train": "--config.SECTION.KNOB=VALUE", "convert": "--weights=", "knobs": "--imports="}
    assert wanted[name] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "there is no command 'trian'; did you mean 'train'?"),
        (("knobs", "lerning_rate"), "no knob matches 'lerning_rate'; did you mean 'learning_rate'?"),
        (("models", "a", "b"), "takes one pattern, not 2"),
        (("methods", "--import=x"), "has no flag --import=x"),
        (("methods", "--imports=no_such_module"), "--imports needs the module 'no_such_module'"),
    ],
)
def test_mistakes_get_one_line(arguments, message):
    done = ekd(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_knob_is_explained():
    """Default, meaning and allowed values of every knob of a run and of every method."""
    text = catalog.knobs("")
    for name in KNOBS:
        assert f"config.{name} = " in text
    entries = re.findall(r"^config\.(\S+).* = .*\n((?:    .*\n?)+)", text, re.M)
    assert len(entries) > len(KNOBS) + 50
    for name, meaning in entries:
        assert len(meaning.split()) > 1, f"{name}: {meaning}"
        assert "." in meaning, name
    assert "Allowed: one of sgd, adam, rmsprop, adamw, lamb, lion." in catalog.knobs("optimizer.name")
    assert re.search(r"\(.*\boem\b.*\) = 2.0", catalog.knobs("method.temperature"))


def test_every_network_and_method_is_listed():
    models, methods = catalog.models(""), catalog.methods("")
    for name in list_models():
        assert re.search(rf"\b{name}\b", models), name
    assert re.findall(r"^(\w+)$", methods, re.M) == list_methods()
    assert "vgg8 (3,965,028)" in catalog.models("vgg8")
    with pytest.raises(UserError, match="did you mean 'resnet"):
        catalog.models("resnt20")
