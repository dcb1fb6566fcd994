"""What an engine says that cannot sleep, or cannot wake up."""


class SleepError(ValueError):
    """The engine is as it was before it was asked; the message, one line, says why."""
