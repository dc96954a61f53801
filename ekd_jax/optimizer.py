"""The optimiser, from config and number of steps."""

from typing import Any

import optax

from ekd_jax.methods.base import Method

RMSPROP_DECAY, RMSPROP_EPSILON = 0.9, 1e-3  # of EfficientNet; the epsilon is added under the root


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Step -> rate: `learning_rate`, times `decay` at each milestone (a fraction of training) and every
    `decay_every_epochs`; or half a cosine down to 0."""
    knobs = config.optimizer
    if knobs.schedule == "cosine":
        return optax.cosine_decay_schedule(knobs.learning_rate, steps)
    drops = {round(m * steps): knobs.decay for m in knobs.milestones}
    rate = optax.piecewise_constant_schedule(knobs.learning_rate, drops)
    if not knobs.decay_every_epochs:
        return rate
    every = max(1, round(knobs.decay_every_epochs * steps / config.train.epochs))
    factor = optax.exponential_decay(1.0, every, knobs.decay, staircase=True)
    return lambda step: rate(step) * factor(step)


def make_optimizer(config: Any, method: Method, steps: int) -> optax.GradientTransformation:
    """SGD, Adam or RMSProp, with PyTorch's weight decay: L2, in the gradient, of batch norm and biases too.

    The method's own parameters (`method/<name>`) learn at a rate scaled by its
    `learning_rate_scales`.
    """
    knobs = config.optimizer
    rate = method.learning_rate(config, steps) or learning_rate(config, steps)
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
