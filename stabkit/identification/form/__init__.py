"""The affine normal form of a step: states, stages, coefficients, and what is linear in them."""
