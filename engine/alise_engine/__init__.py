"""vLLM plug-ins of ALISE: scheduler, stream to the sidecar, token table, launcher."""
