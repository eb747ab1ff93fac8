"""The organization's side: its site (data, ledger, outbox), training, and the Flower ClientApp that answers requests."""

if __name__ != "cotune.client":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.client`")
