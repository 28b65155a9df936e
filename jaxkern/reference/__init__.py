"""References in plain jax.numpy: what the kernels are tested against and the "xla" path."""
