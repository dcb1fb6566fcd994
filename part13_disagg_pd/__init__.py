"""An engine that computes prompts for other engines, or lets others compute its own."""
