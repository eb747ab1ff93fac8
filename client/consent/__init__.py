"""Whether an organization takes part in a plan: what the plan means for it, what its policy says, who has approved it."""
