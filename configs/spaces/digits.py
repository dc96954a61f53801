"""A space for configs/digits.py: learning rate, weight decay, batch size and temperature.

    python -m ekd_jax.search --config=configs/digits.py --config.data.validation_examples=180 \
        --space=configs/spaces/digits.py
"""

from typing import Any


def get_space() -> dict[str, Any]:
    """Return the knobs and their values: a list of choices, or a range."""
    return {
        "optimizer.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
        "optimizer.weight_decay": {"low": 1e-5, "high": 1e-2, "log": True},
        "train.batch_size": [32, 64, 128],
        "method.temperature": {"low": 1.0, "high": 6.0},
    }
