"""The plan: the one document that server and organizations agree on. Whatever it does not say, nobody does."""

if __name__ != "cotune.plan":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.plan`")
