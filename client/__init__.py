"""The organisation: its site (data, ledger, outbox), its training, and the Flower ClientApp that answers requests."""
