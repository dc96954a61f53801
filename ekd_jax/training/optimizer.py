"""The optimizer and its learning rate schedule, from a configuration and the number of steps."""

from typing import Any

import optax
from ml_collections import FrozenConfigDict

from ekd_jax.methods.base import Method

RMSPROP_DECAY, RMSPROP_EPSILON = 0.9, 1e-3  # EfficientNet's; the epsilon is added under the root


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


def warmed_up(rate: optax.Schedule, config: FrozenConfigDict, steps: int) -> optax.Schedule:
    """Return the schedule scaled by the batch size, with linear warm-up.

    The warm-up starts at the unscaled rate if the rate is scaled up, otherwise at 0.
    """
    scale, epochs = batch_scale(config), warmup_epochs(config)
    if not epochs:
        return lambda step: scale * rate(step)
    first = 1.0 if scale > 1 else 0.0
    rise = optax.linear_schedule(first, scale, max(1, round(epochs * steps / config.train.epochs)))
    return lambda step: rise(step) * rate(step)


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
    `decay_every_epochs`; or half a cosine down to 0.
    """
    knobs = config.optimizer
    if knobs.schedule == "cosine":
        return optax.cosine_decay_schedule(knobs.learning_rate, steps)
    drops = {round(m * steps): knobs.decay_factor for m in knobs.milestones}
    rate = optax.piecewise_constant_schedule(knobs.learning_rate, drops)
    if not knobs.decay_every_epochs:
        return rate
    every = max(1, round(knobs.decay_every_epochs * steps / config.train.epochs))
    factor = optax.exponential_decay(1.0, every, knobs.decay_factor, staircase=True)
    return lambda step: rate(step) * factor(step)


def make_optimizer(config: FrozenConfigDict, method: Method, steps: int) -> optax.GradientTransformation:
    """Make SGD, Adam or RMSProp with PyTorch's weight decay: L2, added to the gradient, also of batch norm and biases.

    The learning rate of the method's own parameters (`method/<name>`) is scaled by its `learning_rate_scales`.

    Args:
        config: a complete configuration.
        method: may have a schedule of its own.
        steps: of the whole run.
    """
    knobs = config.optimizer
    own = method.learning_rate_schedule(knobs.learning_rate, steps, config.train.epochs)
    rate = own or learning_rate(config, steps)
    if batch_scale(config) != 1 or warmup_epochs(config):
        rate = warmed_up(rate, config, steps)
    momentum = knobs.momentum or None
    match knobs.name:
        case "adam":
            update = optax.adam(rate)
        case "rmsprop":
            update = optax.rmsprop(rate, RMSPROP_DECAY, RMSPROP_EPSILON, momentum=momentum)
        case _:
            update = optax.sgd(rate, momentum, nesterov=knobs.nesterov)
    scales = method.learning_rate_scales

    def scale(updates: Any, params: Any = None) -> Any:
        own = updates["method"]
        scaled = {name: optax.tree.scale(scales.get(name, 1.0), tree) for name, tree in own.items()}
        return {**updates, "method": scaled}

    return optax.chain(optax.add_decayed_weights(knobs.weight_decay), update, optax.stateless(scale))
