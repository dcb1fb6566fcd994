"""Several processes as one engine: how they find each other, talk, and notice that one is gone."""
