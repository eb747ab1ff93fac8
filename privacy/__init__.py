"""Record-level differential privacy: DP-SGD, its noise, its accounting, and the organisation's ledger."""
