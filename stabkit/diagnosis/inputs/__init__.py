"""What the input itself does to a network: its scale, its padding, its zeros."""
