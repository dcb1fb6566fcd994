"""An engine that runs mixtures of experts, and spreads the experts over its ranks."""
