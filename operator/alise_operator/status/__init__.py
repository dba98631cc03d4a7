"""Pure functions from what was seen in the cluster to `ALISEService.status`."""
