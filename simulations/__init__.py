"""Many organizations on one machine: to see whether federation pays off before anyone signs anything."""

if __name__ != "cotune.simulations":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.simulations`")
