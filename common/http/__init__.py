"""The server around an engine: OpenAI's protocol, metrics, traces and a page, over FastAPI.

Start at `app.Frontend`, which a part's `server.py` fills, and `run.serve`, which starts it. Requests
are `schemas`, answers `responses`; `middleware` is what a request passes first.
"""
