"""Where gradients stop, and where derivatives are not those of what is computed."""
