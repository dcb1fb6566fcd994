"""Servers that speak an engine's wire format and have no engine: for tests and measurements of a router."""
