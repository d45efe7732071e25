"""The gRPC server, its services and its client."""
