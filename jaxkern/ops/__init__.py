"""Public functions: one file per family of kernels."""
