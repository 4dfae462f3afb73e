"""Long, heavy checks of promises: run by hand or by `make fuzz` and `make soak`, each with a short form in the tests."""
