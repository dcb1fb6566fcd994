"""An engine whose weights, and keys and values, are numbers of 8 or 4 bits."""
