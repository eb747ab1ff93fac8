"""Record-level differential privacy: DP-SGD, its noise, its accounting, and the organization's ledger."""

if __name__ != "cotune.privacy":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.privacy`")
