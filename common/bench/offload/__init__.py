"""`offload`: what part 12's host tier saves: bursts, conversations that return, restarts, policies."""
