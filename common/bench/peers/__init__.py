"""Adapters of `compare`: one file for each engine that a part is measured against.

They are run by their path, with the Python of the peer's own environment. Start at `peer_protocol`.
"""
