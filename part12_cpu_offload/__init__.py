"""An engine whose KV cache goes on in the host's memory, and on disk."""
