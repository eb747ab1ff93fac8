"""A simulation on several cores: processes that keep the model, and answer for organizations or play baselines."""
