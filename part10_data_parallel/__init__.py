"""Several engines behind one front door, which sends each request where it fits best."""
