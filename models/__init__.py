"""The pretrained model that everybody holds: loading, sharing groups, adapters, tasks, cached features, export, records."""

if __name__ != "cotune.models":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.models`")
