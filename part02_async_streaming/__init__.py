"""An engine that streams: its own thread, a queue of requests, tokens sent as they are born."""
