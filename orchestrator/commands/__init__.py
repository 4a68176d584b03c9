"""What each command does, as coroutines that return its exit code."""
