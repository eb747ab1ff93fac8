"""Imported last by a process that others are forked from: their garbage collections look only at what they make themselves."""

import gc

gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 20)
