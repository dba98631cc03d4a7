"""Generated protobuf and gRPC stubs of `alise.scheduler.v1`; made by `make proto`."""
