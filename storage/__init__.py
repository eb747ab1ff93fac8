"""Documents on disk that a crash leaves whole: atomic writes, locks, append-only logs, and the base of configuration tables."""

if __name__ != "cotune.storage":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.storage`")
