"""What is raised when a model cannot be had; importing it imports nothing else."""


class ModelError(ValueError):
    """A model that cannot be found, read or trusted; the message is one line for the user."""
