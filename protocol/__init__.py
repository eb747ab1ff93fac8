"""What the server and organizations exchange: messages, signed statements, and the federation file."""

if __name__ != "cotune.protocol":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.protocol`")
