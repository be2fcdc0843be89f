"""Parameters without a gradient, or with a wrong one: cuts, unused and unregistered tensors, zero gradients."""
