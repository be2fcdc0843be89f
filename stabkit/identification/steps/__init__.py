"""Kinds of steps that an affine normal form alone does not show."""
