"""A run's report: what is measured for it, how a run's files are read, its plots and its page."""
