"""Structured output: grammars that an output is to follow, compiled, and matched token by token.

llguidance does the parsing. It is imported where a grammar is compiled: an engine that is asked for
none runs without it.
"""
