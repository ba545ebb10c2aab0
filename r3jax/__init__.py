"""r3jax: Reason-Reflect-Refine reinforcement learning of BAGEL in JAX."""

__version__ = "0.1.0"
