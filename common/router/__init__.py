"""What a router needs and no chapter teaches: its settings, HTTP to a replica, the relaying of streams,
starting replicas as processes or as Ray's actors, and their metrics in one text."""
