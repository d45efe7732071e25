"""Collections that a Milvus keeps, behind the interface of those on disk: for many machines."""
