"""Structured output: grammars that outputs must follow, compiled, and matched token by token.

llguidance does the parsing. It is imported when the first grammar is compiled, so an engine without
grammars runs without it.
"""
