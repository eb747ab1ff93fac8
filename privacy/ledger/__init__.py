"""An organization's durable account of what it spent: written before a record is touched, and verifiable."""
