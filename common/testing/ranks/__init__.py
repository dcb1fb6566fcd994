"""A package whose ranks do what a test tells them (see `worker`)."""
