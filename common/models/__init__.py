"""Models as files: from a name to a folder, and from the folder to weights, tokens and text.

Start at `checkpoint.resolve` and `tokenizer.Tokenizer`. `python -m common.models smollm2-135m`
has a model there ahead of time. All that cannot be read is an `errors.ModelError`.
"""
