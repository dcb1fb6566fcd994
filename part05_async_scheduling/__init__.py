"""An engine that schedules and launches the next step before the tokens of the last are read."""
