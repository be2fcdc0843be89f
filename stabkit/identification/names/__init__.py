"""Names of methods and their step sizes."""
