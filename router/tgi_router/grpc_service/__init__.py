"""The public gRPC service (proto/inference.proto). Imported only when `--grpc-port` is given."""
