"""Batched linear operators: one block per sample, known by their products with vectors."""

from __future__ import annotations

from stabkit.operators.jacobian import Jacobian, compose, from_dense
from stabkit.operators.linear_map import LinearMap

__all__ = ["Jacobian", "LinearMap", "compose", "from_dense"]
