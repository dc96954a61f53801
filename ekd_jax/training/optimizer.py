"""The optimizer, from config and number of steps."""

from typing import Any

import optax

from ekd_jax.methods.base import Method

RMSPROP_DECAY, RMSPROP_EPSILON = 0.9, 1e-3  # of EfficientNet; the epsilon is added under the root


def batch_scale(config: Any) -> float:
    """Factor on the learning rate: the batch over `reference_batch_size`, the linear scaling rule (Goyal et
    al. 2017, arXiv 1706.02677); 1 unless asked for."""
    reference = config.optimizer.reference_batch_size
    return config.train.batch_size / reference if reference else 1.0


def warmup_epochs(config: Any) -> float:
    """Goyal et al.'s 5 epochs for a rate that is scaled up, unless it is said otherwise."""
    asked = config.optimizer.warmup_epochs
    return asked if asked >= 0 else 5.0 * (batch_scale(config) > 1)


def warmed_up(rate: optax.Schedule, config: Any, steps: int) -> optax.Schedule:
    """The schedule scaled by the batch, with its first epochs on the way from the unscaled rate, or from 0
    where none is scaled up, in equal steps."""
    scale, epochs = batch_scale(config), warmup_epochs(config)
    if not epochs:
        return lambda step: scale * rate(step)
    first = 1.0 if scale > 1 else 0.0
    rise = optax.linear_schedule(first, scale, max(1, round(epochs * steps / config.train.epochs)))
    return lambda step: rise(step) * rate(step)


def rate_in_words(config: Any) -> str:
    """How the rate was changed because of the batch, or "" if it was not asked for."""
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


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Step -> rate: `learning_rate`, times `decay` at each milestone (a fraction of training) and every
    `decay_every_epochs`; or half a cosine down to 0."""
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


def make_optimizer(config: Any, method: Method, steps: int) -> optax.GradientTransformation:
    """SGD, Adam or RMSProp, with PyTorch's weight decay: L2, in the gradient, of batch norm and biases too.

    The method's own parameters (`method/<name>`) learn at a rate scaled by its
    `learning_rate_scales`.
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
