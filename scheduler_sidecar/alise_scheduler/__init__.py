"""The scheduler sidecar of ALISE: contract, features, predictor, policy, online learning."""
