"""A real forward pass, run under recording, with the model left as it was."""
