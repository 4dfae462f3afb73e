"""Record episodes of an environment as videos or as a clip store, and read logged episodes."""
