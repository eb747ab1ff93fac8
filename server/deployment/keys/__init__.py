"""The federation's keys: its certificate authority, the key that signs requests, and how both are renewed."""
