"""An engine whose model is spread over several processes, each with a slice of every layer."""
