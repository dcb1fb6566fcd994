"""An engine whose sequences join and leave the batch at every step."""
