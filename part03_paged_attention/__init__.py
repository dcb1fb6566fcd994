"""An engine whose KV cache is cut into blocks, so that many sequences share one piece of memory."""
