"""What can be wrong with a machine, Ray, a database and what earlier runs left: looked at for `doctor`."""
