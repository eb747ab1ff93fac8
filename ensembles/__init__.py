"""Several finished models as one: their predictions fused."""

if __name__ != "cotune.ensembles":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.ensembles`")
