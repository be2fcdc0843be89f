"""Faults of one block, told by its peers: the sizes of its weights, its gain, how it was initialised."""
