"""The platform that a network is traced for.

Networks take other ways on CPUs than elsewhere, because XLA does (docs/performance.md). A network that leaves this
package, as a file for another runtime, takes none of them: it is traced for no platform in particular.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

ANY = "any"
_chosen: ContextVar[str] = ContextVar("platform", default="")


def platform() -> str:
    """Return the platform that is traced for: "cpu", "gpu", "tpu" or `ANY`; that of JAX unless it was chosen."""
    return _chosen.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
    """Trace for this platform; what was traced before, as a jitted function, stays as it is."""
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
