"""An engine that guesses tokens ahead, and keeps those that one forward confirms."""
