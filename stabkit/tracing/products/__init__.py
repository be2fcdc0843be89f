"""Products with the Jacobians of recorded steps, exact and certified."""
