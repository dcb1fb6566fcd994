"""An engine that cuts prompts into slices and runs them beside sequences that decode."""
