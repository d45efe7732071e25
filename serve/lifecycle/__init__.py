"""What is served and how it changes: leases, loading, versions, watching, swapping."""
