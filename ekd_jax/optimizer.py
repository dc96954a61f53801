"""The optimiser, from config and number of steps."""

from typing import Any

import optax

from ekd_jax.methods.base import Method


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Step -> rate: `learning_rate`, times `decay` at each milestone (a fraction of training)."""
    knobs = config.optimizer
    drops = {round(m * steps): knobs.decay for m in knobs.milestones}
    return optax.piecewise_constant_schedule(knobs.learning_rate, drops)


def make_optimizer(config: Any, method: Method, steps: int) -> optax.GradientTransformation:
    """PyTorch's SGD or Adam: L2 decay enters the gradient, of batch norm and biases too.

    The method's own parameters (`method/<name>`) learn at a rate scaled by its
    `learning_rate_scales`.
    """
    knobs = config.optimizer
    rate = learning_rate(config, steps)
    if knobs.name == "adam":
        update = optax.adam(rate)
    else:
        update = optax.sgd(rate, knobs.momentum or None, nesterov=knobs.nesterov)
    scales = method.learning_rate_scales

    def scale(updates: Any, params: Any = None) -> Any:
        own = updates["method"]
        scaled = {name: optax.tree.scale(scales.get(name, 1.0), tree) for name, tree in own.items()}
        return {**updates, "method": scaled}

    return optax.chain(optax.add_decayed_weights(knobs.weight_decay), update, optax.stateless(scale))
