"""What confirms a reading, and what follows from it."""
