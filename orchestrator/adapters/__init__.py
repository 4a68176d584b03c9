"""One folder for each thing outside; none knows another."""
