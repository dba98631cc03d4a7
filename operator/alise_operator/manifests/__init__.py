"""Pure functions from a spec to Kubernetes manifests. No clock, no network, no kopf."""
