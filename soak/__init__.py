"""Long, heavy checks of promises: run by hand or by `make fuzz`, each with a short form in the tests."""
