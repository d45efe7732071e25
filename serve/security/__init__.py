"""Who may call, over which wire, and how much: TLS, keys, limits, and who a caller is."""
