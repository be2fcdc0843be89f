"""Which vector fields a step evaluates, and where."""
