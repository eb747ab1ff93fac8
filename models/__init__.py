"""The pretrained model that everybody holds: loading, sharing groups, adapters, tasks, cached features, export; and the records it reads."""
