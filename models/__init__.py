"""The pretrained model that all organizations have: loading, parameter groups, adapters, features, evaluation, and export."""

if __name__ != "cotune.models":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.models`")
