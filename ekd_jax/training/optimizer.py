"""The optimizer and its learning rate schedule, from a configuration and the number of steps."""

from typing import Any

import jax
import optax
from ml_collections import FrozenConfigDict

from ekd_jax.common.errors import UserError
from ekd_jax.methods.base import Method

RMSPROP_DECAY = 0.9  # EfficientNet's
# The optimizer's own value where a knob is -1. RMSProp's is EfficientNet's, and is added under the root.
EPSILON = {"adam": 1e-8, "adamw": 1e-8, "lamb": 1e-6, "rmsprop": 1e-3}
B2 = {"adam": 0.999, "adamw": 0.999, "lamb": 0.999, "lion": 0.99}
DECOUPLED = ("adamw", "lamb", "lion")  # weight decay is no part of the gradient
NORM_AND_BIAS = ("scale", "bias")  # names of parameters; scanned blocks stack them, so axes do not tell


def batch_scale(config: FrozenConfigDict) -> float:
    """Return the factor of the linear scaling rule: the batch size over `reference_batch_size`, or 1 without it.

    Reference: Goyal et al. 2017, arXiv 1706.02677.
    """
    reference = config.optimizer.reference_batch_size
    return config.train.batch_size / reference if reference else 1.0


def warmup_epochs(config: FrozenConfigDict) -> float:
    """Return the epochs of warm-up: as asked, or Goyal et al.'s 5 for a learning rate that is scaled up."""
    asked = config.optimizer.warmup_epochs
    return asked if asked >= 0 else 5.0 * (batch_scale(config) > 1)


def warmup_steps(config: FrozenConfigDict, steps: int) -> int:
    """Return the steps of warm-up of a run of `steps` steps, 0 if there is none."""
    epochs = warmup_epochs(config)
    return max(1, round(epochs * steps / config.train.epochs)) if epochs else 0


def warmed_up(rate: optax.Schedule, config: FrozenConfigDict, steps: int) -> optax.Schedule:
    """Return the schedule scaled by the batch size, with linear warm-up.

    The warm-up starts at the unscaled rate if the rate is scaled up, otherwise at 0.
    """
    scale, rising = batch_scale(config), warmup_steps(config, steps)
    if not rising:
        return lambda step: scale * rate(step)
    rise = optax.linear_schedule(1.0 if scale > 1 else 0.0, scale, rising)
    return lambda step: rise(step) * rate(step)


def warmed_up_cosine(config: FrozenConfigDict, steps: int) -> optax.Schedule:
    """Return linear warm-up, as in `warmed_up`, followed by half a cosine over the steps that are left.

    Raises:
        UserError: the warm-up leaves no steps.
    """
    knobs, scale, rising = config.optimizer, batch_scale(config), warmup_steps(config, steps)
    if rising >= steps:
        raise UserError(
            f"optimizer.warmup_epochs={warmup_epochs(config):g} leaves no epoch for the cosine: it must be "
            f"below train.epochs={config.train.epochs:g}"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=knobs.learning_rate if scale > 1 else 0.0,
        peak_value=scale * knobs.learning_rate,
        warmup_steps=rising,
        decay_steps=steps,
        end_value=scale * knobs.final_learning_rate,
    )


def rate_factor(config: FrozenConfigDict, rewinds: int) -> float:
    """Return the factor of the learning rate of a run that was rewound so often."""
    return float(config.train.rewind_factor**rewinds)


def rate_in_words(config: FrozenConfigDict) -> str:
    """Return a line that says how the learning rate is scaled and warmed up, or "" if it is not."""
    knobs, scale, epochs = config.optimizer, batch_scale(config), warmup_epochs(config)
    rate = knobs.learning_rate
    parts = []
    if knobs.reference_batch_size:
        parts.append(
            f"learning rate {scale * rate:g} = {rate:g} x {config.train.batch_size} / "
            f"{knobs.reference_batch_size} (optimizer.reference_batch_size)"
        )
    if epochs:
        begin = rate if scale > 1 else 0.0
        parts.append(f"warm-up from {begin:g} over {epochs:g} epochs (optimizer.warmup_epochs)")
    return ", ".join(parts)


def learning_rate(config: FrozenConfigDict, steps: int) -> optax.Schedule:
    """Return the schedule step -> learning rate, without scaling and warm-up.

    It is `learning_rate`, multiplied by `decay_factor` at each milestone (a fraction of training) and every
    `decay_every_epochs`; or half a cosine down to `final_learning_rate`.

    Raises:
        UserError: the final learning rate is above the initial one.
    """
    knobs = config.optimizer
    if knobs.schedule == "cosine":
        if knobs.final_learning_rate > knobs.learning_rate:
            raise UserError(
                f"optimizer.final_learning_rate={knobs.final_learning_rate:g} must not be above "
                f"optimizer.learning_rate={knobs.learning_rate:g}"
            )
        return optax.cosine_decay_schedule(
            knobs.learning_rate, steps, alpha=knobs.final_learning_rate / knobs.learning_rate
        )
    drops = {round(m * steps): knobs.decay_factor for m in knobs.milestones}
    rate = optax.piecewise_constant_schedule(knobs.learning_rate, drops)
    if not knobs.decay_every_epochs:
        return rate
    every = max(1, round(knobs.decay_every_epochs * steps / config.train.epochs))
    factor = optax.exponential_decay(1.0, every, knobs.decay_factor, staircase=True)
    return lambda step: rate(step) * factor(step)


def make_schedule(config: FrozenConfigDict, method: Method, steps: int) -> optax.Schedule:
    """Return the schedule step -> learning rate of a run: the method's own, or the configured one.

    Raises:
        UserError: the configured schedule is impossible.
    """
    knobs = config.optimizer
    own = method.learning_rate_schedule(knobs.learning_rate, steps, config.train.epochs)
    if own and config.train.patience_epochs:
        raise UserError(
            f"train.patience_epochs={config.train.patience_epochs:g}: {config.method.name} has a learning rate "
            f"schedule of its own, which must run to its end: leave it out"
        )
    rate = own or learning_rate(config, steps)
    if not own and knobs.schedule == "cosine" and warmup_epochs(config):
        return warmed_up_cosine(config, steps)
    if batch_scale(config) != 1 or warmup_epochs(config):
        return warmed_up(rate, config, steps)
    return rate


def make_optimizer(config: FrozenConfigDict, method: Method, steps: int) -> optax.GradientTransformation:
    """Make the optimizer that `config.optimizer` describes.

    1. With `clip_norm`, the gradient is scaled down to this global norm if it is longer: the norm of the
       gradients of all that learns, networks and the method's own layers together, without weight decay.
    2. For sgd, adam and rmsprop, weight decay is PyTorch's: L2, added to the gradient. For adamw, lamb and
       lion, it is decoupled: added to the update, before the update is multiplied by the learning rate (and,
       for lamb, by the trust ratio).
    3. Batch norm's parameters and biases decay, too, unless `decay_norm_and_bias` is False.
    4. The updates of the method's own parameters (`method/<name>`) are multiplied by its
       `learning_rate_scales`.

    Args:
        config: a complete configuration.
        method: may have a schedule of its own.
        steps: of the whole run.

    Raises:
        UserError: the schedule is impossible.
    """
    knobs = config.optimizer
    clip = [optax.clip_by_global_norm(knobs.clip_norm)] if knobs.clip_norm else []
    mask = None if knobs.decay_norm_and_bias else _without_norm_and_bias
    update = _make_update(config, make_schedule(config, method, steps), mask)
    if knobs.name not in DECOUPLED:
        clip.append(optax.add_decayed_weights(knobs.weight_decay, mask))
    scales = method.learning_rate_scales

    def scale(updates: Any, params: Any = None) -> Any:
        own = updates["method"]
        scaled = {name: optax.tree.scale(scales.get(name, 1.0), tree) for name, tree in own.items()}
        return {**updates, "method": scaled}

    return optax.chain(*clip, update, optax.stateless(scale))


def _make_update(config: FrozenConfigDict, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    """Make the optimizer by its name; decoupled weight decay is part of it."""
    knobs = config.optimizer
    name, momentum, b1, decay = knobs.name, knobs.momentum or None, knobs.b1, knobs.weight_decay
    b2 = B2.get(name, 0.0) if knobs.b2 < 0 else knobs.b2
    epsilon = EPSILON.get(name, 0.0) if knobs.epsilon < 0 else knobs.epsilon
    match name:
        case "adam":
            return optax.adam(rate, b1, b2, epsilon)
        case "adamw":
            return optax.adamw(rate, b1, b2, epsilon, weight_decay=decay, mask=mask)
        case "lamb":
            return optax.lamb(rate, b1, b2, epsilon, weight_decay=decay, mask=mask)
        case "lion":
            return optax.lion(rate, b1, b2, weight_decay=decay, mask=mask)
        case "rmsprop":
            return optax.rmsprop(rate, RMSPROP_DECAY, epsilon, momentum=momentum)
        case _:
            return optax.sgd(rate, momentum, nesterov=knobs.nesterov)


def _without_norm_and_bias(params: Any) -> Any:
    """Return which parameters decay when batch norm's and biases do not, as a tree of booleans."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NORM_AND_BIAS, params)
