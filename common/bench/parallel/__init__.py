"""Several ranks as one engine: a model of what a step costs, and what this machine says to it."""
