"""Configurations: unknown and impossible knobs, variants, and that every knob is read."""

import ast
import importlib.util
import pathlib
import re

import jax
import pytest
from conftest import ROOT, TINY, tiny_config

from ekd_jax.common.errors import UserError
from ekd_jax.config.build import NETWORK_OPTIONS
from ekd_jax.config.knobs import KNOBS, default_config, method_knobs
from ekd_jax.config.resolve import fingerprint, resolve, to_dict
from ekd_jax.methods import METHODS
from ekd_jax.training.dry_run import dry_run

CONFIGS = sorted(set(ROOT.glob("configs/*.py")) - set(ROOT.glob("configs/compare_*.py")))  # of one run each


def recipe(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attribute_chains():
    """Every `a.b.c` in the package, as tuples of names."""
    chains = set()
    for file in (ROOT / "ekd_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            while isinstance(node, ast.Attribute):
                names.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name):
                names.append(node.id)
            chains.add(tuple(reversed(names)))
    return chains


def test_every_knob_is_read():
    """A knob nothing reads is a lie: `config.section.knob`, or `knobs.knob` where a section is named."""
    chains = attribute_chains()
    pairs = {chain[i : i + 2] for chain in chains for i in range(len(chain) - 1)}
    aliases = {"optimizer": "knobs", "data": "section"}
    for path in KNOBS:
        section, _, name = path.rpartition(".")
        if path == "imports" or (section == "model" and name in NETWORK_OPTIONS):
            continue  # read before there is a configuration; read by name
        read = {(section or "config", name), (aliases.get(section, section), name)}
        assert read & pairs, f"nothing reads config.{path}"


@pytest.mark.parametrize("method", METHODS)
def test_every_knob_of_a_method_is_read(method):
    """As an attribute, or by its name, elsewhere than where it is checked."""
    read = set()
    for file in (*(ROOT / "ekd_jax/methods").glob("*.py"), ROOT / "ekd_jax/training/plans.py"):
        tree = ast.parse(file.read_text())
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            if function.name != "__post_init__":
                read |= {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
                read |= {n.value for n in ast.walk(function) if isinstance(n, ast.Constant)}
    for path in method_knobs(method):
        name = path.removeprefix("method.")
        assert name in read, f"{method} does not read its knob {name}"


def test_cifar100_has_a_file_of_its_own():
    """The short name stands for the variant of the recipe of all three data sets."""
    short, long = (recipe(ROOT / "configs" / f"{name}.py") for name in ("resnet_cifar100", "resnet_cifar"))
    for argument in ("depth=110", "depth=20,recipe=official"):
        assert short.get_config(argument) == long.get_config(f"data=cifar100,{argument}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_resolves_and_says_how_it_is_used(path):
    module = recipe(path)
    config = resolve(module.get_config())
    assert f"--config=configs/{path.name}" in module.__doc__
    assert resolve(to_dict(config)) == config, "config.json read back is the same configuration"


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("resnet_cifar100", "", ("resnet20", "sgd", 450, 128, 2.0, 1e-4)),
        ("resnet_cifar100", "depth=110", ("resnet110", "sgd", 450, 128, 2.0, 1e-4)),
        ("resnet_cifar100", "depth=56,recipe=official", ("resnet56", "adam", 350, 128, 2.0, 1e-5)),
        ("resnet_cifar100", "recipe=official", ("resnet20", "adam", 400, 64, 3.0, 1e-5)),
        ("resnet_cifar", "", ("resnet20", "sgd", 350, 128, 2.0, 1e-4)),
        ("resnet_cifar", "depth=110,recipe=official", ("resnet110", "sgd", 250, 128, 3.0, 1e-4)),
        ("resnet_cifar", "data=svhn,depth=44", ("resnet44", "sgd", 50, 128, 2.0, 1e-4)),
        ("resnet_imagenet", "depth=101", ("resnet101", "sgd", 100, 256, 2.0, 1e-4)),
        ("densenet", "data=svhn", ("densenet_bc_12_100", "sgd", 50, 64, 2.0, 1e-4)),
        ("densenet", "data=imagenet", ("densenet121", "sgd", 100, 256, 2.0, 1e-4)),
        ("resnext", "data=cifar100", ("resnext50_32x4d", "sgd", 450, 128, 2.0, 1e-4)),
        ("efficientnet", "data=cifar10,size=b4", ("efficientnet_b4", "rmsprop", 350, 64, 2.0, 1e-4)),
    ],
)
def test_variants(name, argument, expected):
    config = resolve(recipe(ROOT / "configs" / f"{name}.py").get_config(argument))
    method, train = config.method, config.train
    optimizer = config.optimizer
    found = (config.model.name, optimizer.name, train.epochs, train.batch_size, method.temperature)
    assert (*found, optimizer.weight_decay) == expected


# Every row of the paper's Tables 2, 3, 5 and 6, in an order in which equal networks are neighbors.
DATA = {"cifar10": "cifar10", "svhn": "svhn_cropped", "cifar100": "cifar100", "imagenet": "imagenet2012"}
ROWS = [
    *(
        ("resnet_cifar", f"data={data},depth={depth}", data)
        for depth in (20, 32, 44, 110)
        for data in ("cifar10", "svhn")
    ),
    *(("resnet_cifar100", f"depth={depth}", "cifar100") for depth in (32, 44, 56, 110)),
    *(("resnet_imagenet", f"depth={depth}", "imagenet") for depth in (18, 34, 50, 101)),
    *((name, f"data={data}", data) for name in ("densenet", "resnext") for data in DATA),
    *(
        ("efficientnet", f"data={data},size={size}", data)
        for size in ("b0", "b2", "b4")
        for data in ("cifar10", "svhn", "cifar100")
    ),
]


# One network of a family on every kind of data, and every network on one, are enough.
SLOW = [
    (name, argument, data)
    for name, argument, data in ROWS
    if (name in ("densenet", "efficientnet") and (data != "cifar10" or argument.endswith(("b2", "b4"))))
    or (name == "resnext" and data in ("svhn", "cifar100"))
    or (name == "resnet_cifar" and data == "svhn" and not argument.endswith("=20"))
]


@pytest.mark.parametrize(
    ("name", "argument", "data"),
    [pytest.param(*row, marks=pytest.mark.slow if row in SLOW else ()) for row in ROWS],
    ids=lambda value: value,
)
def test_every_row_of_the_papers_tables_can_be_run(name, argument, data, tmp_path):
    config = resolve(recipe(ROOT / "configs" / f"{name}.py").get_config(argument))
    assert config.data.name == DATA[data]
    assert config.model.students == 5
    text = dry_run(config, tmp_path / "run")
    assert f"{config.train.epochs:g} epochs" in text
    assert "memory per device, estimated" in text
    assert len(re.findall(r"^[1-5]  +[0-9.]+  ", text, re.MULTILINE)) == 5, "one line per student"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method", ["one", "dml", "okddip", "cl_ilr", "kdcl", "ffl", "pcl", "byot", "snapshot"]
)
def test_every_online_method_has_a_protocol(method, tmp_path):
    config = resolve(recipe(ROOT / "configs/online_cifar100.py").get_config(f"method={method}"))
    assert config.method.name == method
    assert "nothing was trained" in dry_run(config, tmp_path / "run")


@pytest.mark.parametrize("method", ["kd", "dckd", "ekd", "srm", "blockwise", "self_distillation"])
@pytest.mark.parametrize("pair", ["resnet56-resnet20", "resnet32x4-resnet8x4"])
def test_every_method_with_teachers_has_a_protocol(method, pair):
    get_config = recipe(ROOT / "configs/kd_cifar100.py").get_config
    teacher, student = pair.split("-")
    config = resolve(get_config(f"pair={pair},method={method}"))
    assert (config.method.name, config.model.name) == (method, student)
    alone = resolve(get_config(f"pair={pair},role=teacher"))
    assert (alone.method.name, alone.model.name) == ("baseline", teacher)
    assert (config.train, config.optimizer, config.data) == (alone.train, alone.optimizer, alone.data)


@pytest.mark.parametrize(
    ("pair", "loss", "expected"),
    [
        ("resnet56-resnet20", "kl", ("kl", False, 4.0, 0.1, 0.9, 2.0)),
        ("resnet56-resnet20", "dkd", ("dkd", False, 4.0, 1.0, 1.0, 2.0)),
        ("resnet32x4-resnet8x4", "dkd", ("dkd", False, 4.0, 1.0, 1.0, 8.0)),
        ("resnet110-resnet32", "dist", ("dist", False, 4.0, 1.0, 1.0, 2.0)),
        ("resnet56-resnet20", "lskd", ("kl", True, 2.0, 0.1, 9.0, 2.0)),
        ("resnet32x4-resnet8x4", "dkd_lskd", ("dkd", True, 4.0, 1.0, 1.0, 8.0)),
    ],
)
def test_losses_of_the_usual_protocol(pair, loss, expected):
    """docs/reference/kd_losses.md."""
    get_config = recipe(ROOT / "configs/kd_cifar100.py").get_config
    own = resolve(get_config(f"pair={pair},loss={loss}")).method
    found = (own.kd_loss, own.standardize, own.temperature, own.ce_weight, own.kd_weight, own.dkd_beta)
    assert found == expected


def test_the_default_recipe_is_the_papers():
    config = resolve(recipe(ROOT / "configs/resnet_cifar100.py").get_config())
    optimizer, method = config.optimizer, config.method
    assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.9, True)
    assert (optimizer.learning_rate, optimizer.decay_factor, optimizer.milestones) == (
        0.1,
        0.1,
        (0.5, 0.75),
    )
    assert (method.alpha, method.beta, method.gamma, method.temperature) == (0.7, 0.15, 0.15, 2.0)
    assert (config.model.students, config.data.crop_padding, config.data.flip) == (5, 4, True)


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("resnet_cifar100", "dept=20", "no variant 'dept'; did you mean 'depth'"),
        ("resnet_cifar100", "depth=21", "depth='21' is unknown; did you mean '20'"),
        ("resnet_cifar100", "recipe=ofical", "did you mean 'official'"),
        ("resnet_cifar100", "data=cifar10", "data='cifar10' is unknown; did you mean 'cifar100'"),
        ("resnet_cifar", "depth=44,recipe=official", "no config for depth=44 on CIFAR-10: use depth=20"),
        ("resnet_cifar", "data=svhn,recipe=official", "no config for ResNets on SVHN: use recipe=paper"),
        ("digits", "depth=20", "no variants, remove 'depth=20'"),
    ],
)
def test_wrong_variants(name, argument, message):
    with pytest.raises(UserError, match=message):
        recipe(ROOT / "configs" / f"{name}.py").get_config(argument)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"nme": "resnet8"}}, "unknown knob config.model.nme; did you mean 'model.name'"),
        ({"epochs": 3}, "did you mean 'train.epochs'"),
        ({"model": {"name": "resnet21"}}, "did you mean 'resnet20'"),
        ({"train": {"batch_size": "many"}}, "must be of type int, like its default 128"),
        ({"train": {"batch_size": 12.5}}, "must be of type int"),
        ({"train": {"epochs": True}}, "must be of type float"),
        ({"train": {"batch_size": 0}}, "above 0"),
        ({"optimizer": {"momentum": 1.0}}, "below 1"),
        ({"optimizer": {"milestones": (0.75, 0.5)}}, "increasing"),
        ({"data": {"std": (0.2, 0.0, 0.2)}}, "above 0"),
        ({"seed": -1}, "negative"),
        ({"method": {"name": "omm"}}, "did you mean 'oem'"),
        ({"method": {"name": "baseline", "temperature": 3.0}}, "unknown knob config.method.temperature"),
        ({"model": {"students": (1, 0.01)}}, "smallest usable width"),
        ({"model": {"compressed_stages": 5}}, "between 1 and 3"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(changes)
    assert "\n" not in str(error.value)


def test_switching_the_method_drops_the_recipes_knobs_of_the_other():
    asked = default_config()
    asked.method.name = "baseline"
    assert to_dict(resolve(asked, ["method.name"]))["method"] == {"name": "baseline"}
    asked.method.temperature = 3.0
    with pytest.raises(UserError, match="unknown knob"):
        resolve(asked, ["method.name", "method.temperature"])


def test_fingerprint_tells_what_changes_the_result():
    base = fingerprint(tiny_config())
    assert base == fingerprint(tiny_config(train__log_every_steps=50, data__manual_dir="/elsewhere"))
    for change in ({"seed": 1}, {"train__epochs": 4}, {"method__temperature": 3.0}, {"model__students": 3}):
        assert base != fingerprint(tiny_config(**change)), change


def test_importing_the_package_starts_nothing():
    """Neither JAX nor TensorFlow: the version and the path of the package cost nothing."""
    import subprocess
    import sys

    code = "import sys, ekd_jax; print(ekd_jax.__version__, 'jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.split()[1] == "False"
    assert len(jax.devices()) == 8
    assert TINY


def test_views_of_their_own_are_not_mixed():
    """Every student's images would want labels of their own."""
    with pytest.raises(UserError, match=r"mixup=0.2 mixes labels .* pcl gives every student other images"):
        tiny_config("pcl", data__mixup=0.2)
    tiny_config("one", data__mixup=0.2)
