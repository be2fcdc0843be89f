"""What to change: remedies computed, tried on a copy, judged by short trainings, and carried out."""
