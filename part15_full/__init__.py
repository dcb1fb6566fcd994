"""Everything at once: every technique in one configuration, and what makes the sum fast."""
