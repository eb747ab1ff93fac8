"""Records, and what they are records of: readers of files, tasks, data sets, partitions."""

if __name__ != "cotune.data":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.data`")
