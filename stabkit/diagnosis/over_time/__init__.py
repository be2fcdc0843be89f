"""Time inside depth: recurrent modules and scans of a model, judged over their time steps."""
