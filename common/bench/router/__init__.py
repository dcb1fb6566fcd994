"""`router`: what part 10's policies find in prefix caches, and what a router costs."""
