"""What people read about a run: charts, verdicts, reports, the privacy statement, and the model card."""

if __name__ != "cotune.reporting":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.reporting`")
