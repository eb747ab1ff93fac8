"""The pretrained model that everybody holds: loading, sharing groups, adapters, tasks, cached features, export, records."""
