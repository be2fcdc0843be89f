"""Growth over depth, in nats: gradients now; Lyapunov and finite-time exponents beside them."""

from stabkit.growth.gradients import GradientProfile, gradient_profile

__all__ = ["GradientProfile", "gradient_profile"]
