"""The coordinator: the round loop, admission of updates, checkpoints, evaluation and the report."""

if __name__ != "cotune.server":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.server`")
