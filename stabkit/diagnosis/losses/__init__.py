"""The loss as a step of its own: its domain, its floor, its units, its targets."""
