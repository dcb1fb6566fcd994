"""Measurements of servers and of streams, with latencies as a client sees them.

Start at `serve`: it puts `load` on a server through `client`, which reads events with `sse`.
`streaming` and `arrival` ask what a reader waits for, and what a long prompt does to others.
"""
