"""The API `serving.alise.dev/v1alpha1`: typed models, the source of CRD and reference."""
