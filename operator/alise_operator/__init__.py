"""The ALISE operator: turns `ALISEService` objects into pods, and tells what came of it."""
