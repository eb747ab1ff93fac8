"""The plan: the one document on which the server and organizations agree. Nothing is done that it does not specify."""

if __name__ != "cotune.plan":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.plan`")
