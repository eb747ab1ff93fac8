"""Everything that depends on Flower's private modules, which may change with a minor version of Flower."""

if __name__ != "cotune.flower":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.flower`")
