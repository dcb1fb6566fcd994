"""An engine whose sequences share the blocks of equal beginnings."""
