"""The command line: parse, call, print."""

if __name__ != "cotune.cli":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.cli`")
