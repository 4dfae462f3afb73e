"""Long checks of promises, run by hand or by `make fuzz` and `make soak`. The tests contain a short form of each."""
