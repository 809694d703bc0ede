"""Installing Drover, and the lab: docstring only."""
