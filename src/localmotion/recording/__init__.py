"""Episodes of an environment recorded as videos or as a clip store."""
