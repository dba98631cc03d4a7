"""`alise simulate`: the policy, dispatch and KV-tier decisions that serve, on a modelled engine."""
