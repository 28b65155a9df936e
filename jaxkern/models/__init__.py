"""Whole models in Flax nnx."""

from jaxkern.models.config import Config, RopeScaling

__all__ = ["Config", "RopeScaling"]
