"""One self-contained HTML page about one or more runs: `collect.report` makes it, `rundir.load_run` reads a run."""
