"""Train networks that learn together on CIFAR-100, each method by its own protocol.

    python -m ekd_jax.main --config=configs/online_cifar100.py:method=one
    python -m ekd_jax.main --config=configs/online_cifar100.py:method=okddip,model=resnet110_bottleneck

method (docs/reference/README.md has the sources; numbers that were not verified are marked *):
    one (default)  3 branches; 300 epochs; SGD with momentum 0.9, learning rate 0.1, divided by 10 at epochs
                   150 and 225; weight decay 1e-4; batch size 128; normalized with CIFAR-10's mean and
                   deviation.
    dml            2 networks; 200 epochs; SGD with Nesterov momentum 0.9, learning rate 0.1, divided by 10
                   every 60 epochs*; weight decay 5e-4; batch size 64*.
    okddip, cl_ilr, kdcl, pcl, ffl
                   3 peers and a leader; a tree of 4 heads; 2 networks; 3 branches; 2 branches. 300 epochs;
                   SGD with Nesterov momentum 0.9, learning rate 0.1, divided by 10 at epochs 150 and 225;
                   weight decay 5e-4 (ffl: 1e-4, and images padded by reflection); batch size 128.
    byot           1 network; 250 epochs; SGD with momentum 0.9, learning rate 0.1, divided by 10 at 1/3 and
                   2/3 of training and 10 epochs before its end; weight decay 5e-4; batch size 128.
    snapshot       1 network; 5 cycles of 40 epochs from learning rate 0.2; SGD with Nesterov momentum 0.9;
                   weight decay 1e-4; batch size 64; the model is resnet110_a by default.
    baseline       1 network by the protocol of okddip.
model: resnet32 (default), resnet110_bottleneck (OKDDip's 1.17M parameters), resnet110_one (ONE's 1.73M),
    resnet110_a (Snapshot's), vgg13, wrn_16_2, densenet_bc_12_100.

Expected top-1 of ResNet-32 in per cent (PCL's README, mean of 3 runs): DML 73.68, CL 72.33, ONE 73.79, FFL
72.18, OKDDip 73.25, KDCL 73.76, PCL 74.14; Snapshot's ensemble of ResNet-110: 75.81 (its paper, recalled). See
docs/reference/published_results.md#online-methods-on-cifar-100.
Not measured here at full length: that needs an accelerator.
"""

from ml_collections import ConfigDict

from ekd_jax.config.knobs import default_config
from ekd_jax.config.recipes import DATA, parse_variant, use_data

STUDENTS = {
    "one": (1, 1, 1),
    "dml": (1, 1),
    "okddip": (1, 1, 1, 1),
    "cl_ilr": (1, 1, 1, 1),
    "kdcl": (1, 1),
    "ffl": (1, 1),
    "pcl": (1, 1, 1),
    "byot": (1,),
    "snapshot": (1,),
    "baseline": (1,),
}
MODELS = (
    *("", "resnet32", "resnet110_bottleneck", "resnet110_one", "resnet110_a"),
    *("vgg13", "wrn_16_2", "densenet_bc_12_100"),
)  # empty: the method's default


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the recipe for method=one|dml|..., model=resnet32|..."""
    variant = parse_variant(argument, method=tuple(STUDENTS), model=MODELS)
    method = variant.method
    config = default_config(method)
    use_data(config, "cifar100")
    config.model.name = variant.model or ("resnet110_a" if method == "snapshot" else "resnet32")
    config.model.students = STUDENTS[method]
    config.train.epochs, config.train.batch_size = 300.0, 128
    config.optimizer.learning_rate, config.optimizer.weight_decay = 0.1, 5e-4
    config.optimizer.milestones = (150 / 300, 225 / 300)
    match method:
        case "one":
            config.optimizer.nesterov, config.optimizer.weight_decay = False, 1e-4
            config.data.mean, config.data.std = DATA["cifar10"].mean, DATA["cifar10"].std
        case "dml":
            config.train.epochs, config.train.batch_size = 200.0, 64
            config.optimizer.milestones = (60 / 200, 120 / 200, 180 / 200)
        case "ffl":
            config.optimizer.weight_decay, config.data.padding_mode = 1e-4, "reflect"
            config.data.mean = (129.3 / 255, 124.1 / 255, 112.4 / 255)
            config.data.std = (68.2 / 255, 65.4 / 255, 70.4 / 255)
        case "byot":
            config.train.epochs, config.optimizer.nesterov = 250.0, False
            config.optimizer.milestones = (1 / 3, 2 / 3, 240 / 250)
        case "snapshot":
            config.train.epochs, config.train.batch_size = 200.0, 64
            config.optimizer.learning_rate, config.optimizer.weight_decay = 0.2, 1e-4
    return config
