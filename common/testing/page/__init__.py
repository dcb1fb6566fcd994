"""The page at `/` in a headless browser, in the words of its user.

Start at `browser.Page`; `engine_page` adds the half that shows the engine's steps.
"""
