"""The simplest engine that serves a model: one request at a time, prefill then decode."""
