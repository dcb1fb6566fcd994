"""`formats`: what each number format of a quantised engine takes, loses and wins. Start at `run`."""
