"""What states and units show: collapse, dead, saturated and copied units, attention, norms and their statistics."""
