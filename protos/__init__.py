"""The wire contract `horace.v1` and the code generated from it (`make protos`)."""
