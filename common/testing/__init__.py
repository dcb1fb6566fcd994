"""What the tests share, and what is run by hand to test for longer.

Start at `parts`, which builds an engine of each part, and `oracle`, which says whether its tokens
are right. `server` and `http` are for the protocol, `schedules` and `soak` for many requests.
"""
