"""a1jax: long-horizon agents trained in three stages, in JAX."""

__version__ = "0.1.0"
