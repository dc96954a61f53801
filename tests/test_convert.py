"""PyTorch weights become students: names of every library, the command, and error messages."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags as absl_flags
from conftest import REFERENCE, command, one_device, tiny_config
from flax.traverse_util import flatten_dict
from PIL import Image

from ekd_jax import convert as convert_command
from ekd_jax import load_student, models
from ekd_jax.common.errors import UserError
from ekd_jax.runs.checkpoint import Checkpoints
from ekd_jax.students.convert import Request, convert, convert_students
from ekd_jax.students.torch_arrays import state_dict
from ekd_jax.students.torch_names import SOURCES, todays_names
from ekd_jax.training import single

# A network of each source, the ways its library has it.
CONVERTED = [
    ("resnet18", "torchvision and timm"),
    ("densenet121", "torchvision and timm"),
    ("efficientnet_b0", "torchvision"),
    ("efficientnet_b5", "torchvision"),
    ("efficientnet_b0", "timm"),
    ("efficientnet_b1", "EfficientNet-PyTorch"),
    ("efficientnet_b1", "the official code"),
    ("densenet_bc_12_100", "the official code"),
    ("mobilenet_v2", "torchvision"),
    ("mobilenet_v2", "timm"),
    ("shufflenet_v2_x0_5", "torchvision"),
    ("resnet20", "RepDistiller"),
    ("resnet20", "the official CIFAR code"),
    ("wrn_16_1", "RepDistiller"),
    ("vgg8", "RepDistiller"),
    ("mobilenet_v2_cifar", "RepDistiller"),
    ("shufflenet_v1_cifar", "RepDistiller"),
    ("shufflenet_v2_cifar", "RepDistiller"),
]


def torch_state(name, library, classes=5, width=1):
    """Return a state dict as the library would have it, and our variables that it was made of."""
    variables = network_variables(name, classes, width)
    return as_torch(variables, name, library), variables


@functools.cache  # by several libraries' names
def network_variables(name, classes, width):
    ensemble = models.build_ensemble(name, (width,), classes)
    return ensemble.student_variables(ensemble.trace((32, 32, 3)).init(0), 1)


def as_torch(variables, name, library):
    """Return a network's variables as a state dict of the library."""
    rules = next(s.rules for s in SOURCES if s.library == library and torch_matches(s, name))
    return state_dict(variables, rules) | {"num_batches_tracked": np.zeros((), np.int64)}


def torch_matches(source, name):
    return re.fullmatch(source.models, name)


@pytest.mark.parametrize(("name", "library"), CONVERTED)
def test_every_value_finds_its_place(name, library):
    state, variables = torch_state(name, library)
    found = convert(Request(name, (32, 32, 3)), state)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert found.network.num_classes == 5
    assert found.library == library
    expected = {
        ("efficientnet_b0", "torchvision"): {"padding": "even"},
        ("efficientnet_b0", "timm"): {"padding": "even"},
        ("efficientnet_b5", "torchvision"): {"padding": "even", "batch_norm_epsilon": 1e-3},  # from B5 on
        ("efficientnet_b1", "EfficientNet-PyTorch"): {"padding": "same", "batch_norm_epsilon": 1e-3},
        ("efficientnet_b1", "the official code"): {"padding": "same"},
    }
    assert found.network.options == expected.get((name, library), {})


# The first, a middle and the last name of the libraries' own state dicts.
THEIRS = {
    ("resnet50", "torchvision and timm"): ("conv1.weight", "layer2.0.downsample.1.running_var", "fc.bias"),
    ("densenet121", "torchvision and timm"): (
        "features.conv0.weight", "features.denseblock3.denselayer24.norm2.bias", "features.norm5.weight",
    ),
    ("efficientnet_b0", "torchvision"): (
        "features.0.0.weight", "features.1.0.block.1.fc2.bias", "features.4.2.block.3.1.weight",
    ),
    ("efficientnet_b0", "timm"): (
        "conv_stem.weight", "blocks.0.0.conv_pw.weight", "blocks.3.2.se.conv_expand.bias",
    ),
    ("efficientnet_b0", "EfficientNet-PyTorch"): (
        "_conv_stem.weight", "_bn0.running_var", "_blocks.0._depthwise_conv.weight", "_blocks.0._bn1.weight",
        "_blocks.1._expand_conv.weight", "_blocks.5._se_reduce.bias", "_blocks.15._bn2.running_mean",
        "_conv_head.weight", "_bn1.bias", "_fc.weight",
    ),
    ("efficientnet_b0", "the official code"): (
        "features.1.weight", "features.2.running_mean", "features_stage_1.0.conv.0.1.weight",
        "features_stage_1.0.conv.1.se.1.bias", "features_stage_1.0.conv.2.weight", "features_stage_1.0.conv.3.bias",
        "features_stage_1.4.conv.1.2.weight", "features_stage_2.5.conv.3.weight", "features_stage_3.4.conv.4.bias",
        "features_stage_3.5.1.weight", "features_stage_3.5.2.running_var", "classifier.1.bias",
    ),
    ("densenet_bc_12_100", "the official code"): (
        "conv1.weight", "dense1.0.bn1.weight", "dense3.15.conv2.weight", "trans2.conv1.weight", "bn1.running_var",
        "fc.bias",
    ),
    ("mobilenet_v2", "torchvision"): (
        "features.1.conv.2.weight", "features.17.conv.1.1.running_mean", "classifier.1.weight",
    ),
    ("shufflenet_v2_x1_0", "torchvision"): (
        "stage2.0.branch1.3.weight", "stage3.7.branch2.6.bias", "conv5.1.running_var",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_names_are_the_libraries(case):
    state, _ = torch_state(*case)
    assert set(THEIRS[case]) <= state.keys()


@pytest.fixture(scope="module")
def resnet8():
    """Return a state dict of RepDistiller, whose classifier is "fc", and our variables that it was made of."""
    return torch_state("resnet8", "RepDistiller")


def renamed(state, pattern, replacement):
    return {re.sub(pattern, replacement, name): value for name, value in state.items()}


SPELLINGS = {
    "fc.1": lambda state: renamed(state, r"^fc\.", "fc.1."),
    "classifier": lambda state: renamed(state, r"^fc\.", "classifier."),
    "head.fc": lambda state: renamed(state, r"^fc\.", "head.fc."),
    "last_linear": lambda state: renamed(state, r"^fc\.", "last_linear."),
    "1x1 convolution": lambda state: state | {"fc.weight": state["fc.weight"][:, :, None, None]},
    "transposed": lambda state: state | {"fc.weight": state["fc.weight"].T},
    "a prefix of any name": lambda state: renamed(state, "^", "my_resnet.0."),
    "linear shortcut": lambda state: (
        state | {"layer2.0.downsample.0.weight": state["layer2.0.downsample.0.weight"][:, :, 0, 0]}
    ),
    "counts": lambda state: (
        state
        | {
            "n_averaged": np.array(7),
            "conv1.total_ops": np.zeros(1),
            "total_params": np.zeros(1),
            "bn1.num_batches_tracked": np.array(3),
        }
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings(resnet8, spelling):
    state, variables = resnet8
    found = convert(Request("resnet8", (32, 32, 3)), SPELLINGS[spelling](state))
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert not found.auxiliary


@pytest.mark.parametrize(
    ("model", "library", "theirs", "todays"),
    [
        ("mobilenet_v2", "torchvision", "classifier", "classifier.1"),
        ("efficientnet_b0", "torchvision", "fc", "classifier.1"),
        ("efficientnet_b0", "EfficientNet-PyTorch", "fc.1", "_fc"),
        ("densenet121", "torchvision and timm", "classifier.2", "classifier"),
        ("resnet20", "the official CIFAR code", "fc", "linear"),
        ("mobilenet_v2_cifar", "RepDistiller", "head.fc", "classifier.0"),
        ("resnet18", "torchvision and timm", "fc", "fc"),
    ],
)
def test_names_of_classifiers(model, library, theirs, todays):
    source = next(s for s in SOURCES if s.library == library and torch_matches(s, model))
    shapes = {f"{theirs}.weight": (5, 7), f"{theirs}.bias": (5,), "features.0.weight": (1, 1)}
    expected = [f"{todays}.weight", f"{todays}.bias", "features.0.weight"]
    assert list(todays_names(source, shapes).values()) == expected
    hidden = shapes | {"head.fc.0.weight": (7, 9), "classifier.9.weight": (7, 9), "_fc.weight": (7, 9)}
    assert all(old == new for old, new in todays_names(source, hidden).items()), (
        "one of several is not chosen"
    )


def test_densenet_of_old_torchvision():
    state, variables = torch_state("densenet121", "torchvision and timm")
    old = renamed(state, r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2")
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    found = convert(Request("densenet121", (32, 32, 3)), old)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)


def test_auxiliary_heads_are_named(resnet8):
    state, _ = resnet8
    found = convert(Request("resnet8", (32, 32, 3)), state | {"aux_head.fc.weight": np.zeros((5, 16))})
    assert found.auxiliary == ("aux_head.fc.weight",)


UNFIT = {
    "missing": (lambda state: without(state, "fc.bias"), ["1 missing: fc.bias", "; there are 47 arrays: "]),
    "left": (
        lambda state: state | {"neck.weight": np.zeros(3), "fc.1.weight": np.zeros((3, 3))},
        ["2 without a place in the network: neck.weight, fc.1.weight"],
    ),
    "shape": (
        lambda state: state | {"conv1.weight": np.zeros((16, 3, 7, 7))},
        ["1 of another shape: conv1.weight is (16, 3, 7, 7) and must be (16, 3, 3, 3)"],
    ),
    "two layers": (
        lambda state: renamed(state, r"^fc\.", "fc.0.") | {"fc.3.weight": np.zeros((5, 5))},
        ["2 missing: fc.weight, fc.bias", "3 without a place in the network: fc.0.weight, fc.3.weight"],
    ),
    "NaN": (
        lambda state: state | {"bn1.weight": np.full(16, np.nan)},
        ["1 unusable: bn1.weight has NaN or infinite values"],
    ),
    "too large": (
        lambda state: state | {"bn1.bias": np.full(16, 1e300)},
        ["1 unusable: bn1.bias has NaN or infinite values"],
    ),
    "integers": (
        lambda state: state | {"conv1.weight": state["conv1.weight"].astype(np.int8)},
        ["1 unusable: conv1.weight has int8 values, not floats"],
    ),
    "variance": (
        lambda state: state | {"bn1.running_var": np.full(16, -1.0)},
        ["1 unusable: bn1.running_var has negative values"],
    ),
}


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize("problem", UNFIT)
def test_what_does_not_fit_is_listed(resnet8, problem):
    change, messages = UNFIT[problem]
    with pytest.raises(UserError) as error:
        convert(Request("resnet8", (32, 32, 3)), change(resnet8[0]))
    assert str(error.value).startswith("the weights do not fit resnet8: ")
    for expected in messages:
        assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert "--model" not in str(error.value), "nothing fits better"


def test_an_error_says_which_network_it_is(resnet8):
    """By names and shapes, of any family, also where the classifier is called otherwise."""
    state = renamed(resnet8[0], r"^fc\.", "fc.1.")
    for asked in ("resnet20", "vgg8"):
        with pytest.raises(
            UserError, match=r"missing: .*; they are those of resnet8: use --model=resnet8$"
        ):
            convert(Request(asked, (32, 32, 3)), state)
    with pytest.raises(UserError, match="; they look more like resnet8$"):
        convert(Request("resnet20", (32, 32, 3)), state | {"neck.weight": np.zeros(3)})


def test_networks_without_rules(monkeypatch):
    monkeypatch.setitem(models.MODELS, "resnet8_mine", models.MODELS["resnet8"])
    with pytest.raises(
        UserError, match="there are no rules to convert its weights .*did you mean 'resnet8"
    ):
        convert(Request("resnet8_mine", (32, 32, 3)), {})


def test_one_output_becomes_two_classes(resnet8):
    """The softmax of (0, z) is the sigmoid of z."""
    state, variables = resnet8
    for change in (lambda kernel: kernel, np.transpose, lambda kernel: kernel[:, :, None, None]):
        one = state | {"fc.weight": change(state["fc.weight"][:1]), "fc.bias": state["fc.bias"][:1]}
        with pytest.raises(UserError, match="has one output.*name two classes, with --class_names"):
            convert(Request("resnet8", (32, 32, 3)), one)
        found = convert(Request("resnet8", (32, 32, 3), two_classes=True), one)
        assert found.network.num_classes == 2
        images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
        logits = models.build_ensemble("resnet8", 1, 5).student(1).logits(variables, images)[:, 0]
        two = models.build_ensemble("resnet8", 1, 2).student(1).logits(found.variables, images)
        np.testing.assert_allclose(jax.nn.softmax(two)[:, 1], jax.nn.sigmoid(logits), rtol=1e-5)


def test_a_narrower_network():
    state, variables = torch_state("resnet8", "RepDistiller", width=0.5)
    found = convert(Request("resnet8", (32, 32, 3), students=("1/2",)), state)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert found.network.widths == ("1/2",) * 3


FITTING = ["--model=resnet8x4", "--weights={folder}/weights.safetensors", "--image_size=32"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return a directory that the command wrote, and the variables that should be in it."""
    folder = tmp_path_factory.mktemp("convert")
    state, variables = torch_state("resnet8x4", "the official CIFAR code")
    averaged = {f"model_ema.{name}": value for name, value in state.items()}
    plain = {f"model.{name}": np.asarray(value + 1) for name, value in state.items()}
    safetensors.numpy.save_file(averaged | plain, folder / "weights.safetensors")
    names = folder / "names.txt"
    names.write_text("\n".join("abcde"))
    flags = [
        f"--weights={folder}/weights.safetensors",
        "--model=resnet8x4",
        "--image_size=32",
        "--fit=stretch",
        "--ema",
    ]
    result = command("convert", *flags, f"--class_names={names}", f"--output={folder}/student")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(
        "student: resnet8x4, 5 classes, 1,209,125 parameters; averaged (EMA) weights were taken; the plain ones "
        f"are there, too; arrays are named as in the official CIFAR code; class names of {names}\n"
    )
    return folder, variables


def test_the_command_writes_a_student(converted, tmp_path):
    folder, variables = converted
    student = load_student(folder / "student")
    jax.tree.map(np.testing.assert_array_equal, student.variables, variables)
    assert student.description.class_names == tuple("abcde")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(student.predict(images).sum(-1), 1, rtol=1e-5)
    Image.fromarray(images[0]).resize((50, 40)).save(tmp_path / "image.png")
    result = command("predict", f"--student_dir={folder}/student", f"--image={tmp_path}/image.png")
    assert result.stdout.count("%") == 3, result.stderr


MISTAKES = [
    (["--model=resnet8x5", "--weights=w.safetensors"], "did you mean 'resnet8x4'"),
    (["--model=tf_efficientnet_b0", "--weights=w.safetensors"], "did you mean 'efficientnet_b0'"),
    (["--model=resnet8x4", "--weights="], "--weights= is empty"),
    (["--model=resnet8x4", "--weights=w.h5"], "must be a file that ends with .safetensors, .pth"),
    (["--model=resnet8x4", "--weights=nowhere.safetensors"], "cannot be read"),
    (["--model=resnet18", "--weights={folder}/weights.safetensors"], "they are those of resnet8x4"),
    (["--model=efficientnet_b0", "--weights=tf_efficientnet_b0.pth"], "tf_ networks need --padding=same"),
    ([*FITTING, "--padding=same"], "only EfficientNets have it, not resnet8x4"),
    ([*FITTING, "--batch_norm_epsilon=0"], "--batch_norm_epsilon=0 must be between 0 and 1"),
    ([*FITTING, "--batch_norm_epsilon=nan"], "--batch_norm_epsilon=nan must be between 0 and 1"),
    ([*FITTING, "--class_names=nowhere.txt"], "--class_names=nowhere.txt cannot be read"),
    ([*FITTING, "--class_names={folder}/four.txt"], "has 4 names, the network 5 classes"),
    ([*FITTING, "--mean=a,b"], "--mean=a,b must be numbers"),
    (
        [*FITTING, "--mean=0.5,0.5"],
        "--mean=0.5,0.5 must be one finite number, or one for each of 3 channels",
    ),
    ([*FITTING, "--mean=nan"], "--mean=nan must be one finite number"),
    ([*FITTING, "--std=1,1,0"], "--std=1,1,0 must be above 0"),
    ([*FITTING, "--std=-1"], "--std=-1 must be above 0"),
    ([*FITTING, "--std=inf"], "--std=inf must be one finite number"),
    ([*FITTING, "--image_size=-1"], "--image_size=-1 must be between 1 and 4096"),
    ([*FITTING, "--image_size=1000000"], "--image_size=1000000 must be between 1 and 4096"),
    ([*FITTING, "--width=0"], "--width=0 must be above 0"),
    ([*FITTING, "--width=1/0"], "--width=1/0 must be a number"),
]


@pytest.fixture
def parse_here(monkeypatch):
    """Give the command flags of its own, in this process."""

    def parse(*flags):
        values = absl_flags.FlagValues()
        with monkeypatch.context() as patch:
            for name in ("string", "boolean", "integer", "float", "enum", "list"):
                define = getattr(absl_flags, f"DEFINE_{name}")
                patch.setattr(absl_flags, f"DEFINE_{name}", functools.partial(define, flag_values=values))
            convert_command.define_flags()
        monkeypatch.setattr(convert_command, "FLAGS", values)
        values(["convert", *map(str, flags)])

    return parse


@pytest.fixture
def run_here(parse_here):
    """Run the command in this process."""

    def run(*flags):
        parse_here(*flags)
        convert_command.main()

    return run


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_get_one_line(converted, run_here, tmp_path, flags, message):
    folder, _ = converted
    (folder / "four.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(UserError) as error:
        run_here(*(flag.format(folder=folder) for flag in flags), f"--output={tmp_path}/student")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_the_command(tmp_path):
    result = command(
        "convert", "--model=resnet8x5", "--weights=w.safetensors", f"--output={tmp_path}/student"
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "names", "message"),
    [
        (
            ["--data=digits"],
            tuple(map(str, range(5))),
            "classes are named 0 to 4 (digits has 10; see --class_names)",
        ),
        (
            [],
            tuple(map(str, range(5))),
            "classes are named 0 to 4 (imagenet2012 has 1000; see --class_names)",
        ),
        (
            ["--data=cifar10"],
            tuple(map(str, range(5))),
            "(those of cifar10 are not known; see --class_names)",
        ),
    ],
)
def test_class_names_without_a_file(converted, run_here, tmp_path, capsys, flags, names, message):
    run_here(
        *(flag.format(folder=converted[0]) for flag in FITTING), *flags, f"--output={tmp_path}/student"
    )
    assert load_student(tmp_path / "student").class_names == names
    printed = capsys.readouterr().out
    assert message in printed
    assert "plain weights were taken; --ema takes the averaged ones" in printed


def test_names_of_the_data_set_if_their_number_fits(run_here, tmp_path, capsys):
    state, _ = torch_state("resnet8", "RepDistiller", classes=10)
    auxiliary = {"module.aux_head.fc.weight": np.zeros((10, 16), np.float32)}
    safetensors.numpy.save_file(state | auxiliary, tmp_path / "ten.safetensors")
    flags = ["--model=resnet8", f"--weights={tmp_path}/ten.safetensors", "--data=digits"]
    run_here(*flags, f"--output={tmp_path}/student")
    assert load_student(tmp_path / "student").class_names[:2] == ("zero", "one")
    printed = capsys.readouterr().out
    assert "class names of digits" in printed
    assert "arrays of auxiliary heads were left out: aux_head" in printed


@pytest.mark.parametrize(
    ("model", "size"), [("efficientnet_b1", 240), ("efficientnet_b7", 600), ("resnet18", 224)]
)
def test_efficientnets_have_their_own_size(parse_here, model, size):
    parse_here(f"--model={model}", "--weights=w", "--output=o")
    assert convert_command._image_size() == size


# --- files of the official code ------------------------------------------------------------------


@pytest.fixture
def official(tmp_path):
    """Return a directory as the official code writes it, and its logits in evaluation mode."""
    with np.load(REFERENCE / "model_reference_resnet20.npz") as file:
        reference = dict(file)
    part = lambda who: {
        name.split("/", 2)[2]: value
        for when in ("init", "after1")
        for name, value in reference.items()
        if name.startswith(f"{when}/{who}/")
    }
    folder = tmp_path / "Epoch_341"
    folder.mkdir()
    files = {"BaseNet": "base", **{f"student_{i}": f"student{i}" for i in range(5)}}
    for name, who in files.items():
        safetensors.numpy.save_file(part(who), folder / f"{name}.pth")  # the contents tell what it is
    return folder, reference


OFFICIAL = ["--model=resnet20", "--image_size=32", "--data=cifar100"]


def test_the_official_codes_files_become_students(official, run_here, tmp_path, capsys):
    folder, reference = official
    run_here(*OFFICIAL, f"--weights={folder}", f"--output={tmp_path}/students")
    assert f"{tmp_path}/students/student_1 to student_5: resnet20, 100 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "students").iterdir())) == 5
    for number in range(1, 6):
        student = load_student(tmp_path / f"students/student_{number}")
        assert student.description.student == number
        assert student.description.network.widths == (("1", "4/5", "3/5", "2/5", "1/5")[number - 1],) * 3
        kernel = student.variables["params"]["head"]["linear"]["kernel"]
        np.testing.assert_array_equal(kernel, reference[f"init/student{number - 1}/linear.weight"].T)
    check_logits(load_student(tmp_path / "students/student_2"), reference, 1)


def check_logits(student, reference, number):
    """Compare with the official code's logits in evaluation mode; it counts students from 0."""
    logits = jax.jit(student.network.logits)(student.variables, reference["x"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(logits, reference["eval_true/student_logits"][number], atol=1e-4)


def test_a_single_student_of_the_official_code(official, run_here, tmp_path):
    folder, reference = official
    (folder / "student_3.pth").rename(folder / "Non_BaseNet.pth")
    for left in folder.glob("student_*.pth"):
        left.unlink()
    run_here(*OFFICIAL, f"--weights={folder}", "--width=0.4", f"--output={tmp_path}/student")
    check_logits(load_student(tmp_path / "student"), reference, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "student_2.pth").unlink(), "but no student_2.pth beside it"),
        (
            lambda folder: [(folder / f"student_{i}.pth").unlink() for i in (0, 3, 4)],
            "do not fit student 1 of resnet20: .*; 2 students have the widths 1, 1/2: is a file missing",
        ),
        (lambda folder: [file.unlink() for file in folder.glob("student*")], "no student_0.pth beside it"),
        (
            lambda folder: (folder / "BaseNet.pth").unlink(),
            "is a directory: give a file, or a directory with",
        ),
        (lambda folder: (folder / "student_3.pth").write_bytes(b"<html>"), "student_3.pth is a web page"),
        (
            lambda folder: shutil.copy(folder / "student_1.pth", folder / "BaseNet.pth"),
            "is in BaseNet.pth and in student_0.pth: they are not a base block and a branch of it",
        ),
    ],
)
def test_official_directories_that_are_not_complete(official, run_here, tmp_path, damage, message):
    folder, _ = official
    damage(folder)
    with pytest.raises(UserError) as error:
        run_here(*OFFICIAL, f"--weights={folder}", f"--output={tmp_path}/students")
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["Epoch_341"], "nothing was written"


def test_students_with_fewer_compressed_stages():
    """The official code may compress the last two of three stages. The shapes tell."""
    ensemble = models.build_ensemble("resnet8", 2, 5, sharing="none", compressed_stages=2)
    variables = ensemble.trace((32, 32, 3)).init(0)
    own = [ensemble.student_variables(variables, number) for number in (1, 2)]
    states = [as_torch(tree, "resnet8", "the official CIFAR code") for tree in own]
    found = convert_students(Request("resnet8", (32, 32, 3), students=2), states)
    assert [student.network.widths for student in found] == [("1", "1", "1"), ("1", "1/2", "1/2")]
    for student, tree in zip(found, own, strict=True):
        jax.tree.map(np.testing.assert_array_equal, student.variables, tree)


@pytest.mark.slow  # test_classes.py starts from given weights, too
def test_training_begins_with_a_students_values(converted, tmp_path):
    """Base block and student 1 start with them, but not a classifier for other classes."""
    folder, variables = converted
    changes = {"model__name": "resnet8x4", "model__students": (1, 0.5)}
    changes |= {"model__initial_weights": str(folder / "student")}
    frozen = {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
    # Digits are gray, so the first convolution differs, too.
    with pytest.raises(UserError, match=r"stem/conv/kernel has shape \(3, 3, 3, 32\), this network"):
        single.run(tiny_config(**changes), tmp_path / "gray", one_device())
    rng = np.random.default_rng(0)
    for number in range(80):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    own = {"data__name": "folder", "data__data_dir": str(tmp_path / "images"), "data__image_size": 8}
    config = tiny_config(**changes, **frozen, **own, data__train_examples=0, train__epochs=0.5)
    single.run(config, tmp_path / "run", one_device())
    found = json.loads((tmp_path / "run/config.json").read_text())["model"]["initial_weights"]
    assert found == str(folder / "student")
    checkpoints = Checkpoints(tmp_path / "run", read_only=True)
    own = variables["params"]
    stages = {name: tree for name, tree in own.items() if name.startswith("stage")}
    like = {"params": {"base": {"stem": own["stem"]}, "students": {"1": stages}}}
    restored, _ = checkpoints.restore_variables(like, checkpoints.steps()[-1])
    checkpoints.close()
    flat = flatten_dict(restored["params"])
    for path, value in flatten_dict(like["params"]).items():
        np.testing.assert_allclose(flat[path], value, rtol=0, atol=1e-30)
    # A run that is resumed no longer needs the directory.
    shutil.move(folder / "student", tmp_path / "moved")
    (tmp_path / "run/summary.json").unlink()
    assert single.run(config, tmp_path / "run", one_device()).students
    shutil.move(tmp_path / "moved", folder / "student")
    with pytest.raises(UserError, match="is another network"):
        single.run(tiny_config(**{**changes, "model__name": "resnet14"}), tmp_path / "other", one_device())
