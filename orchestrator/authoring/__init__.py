"""What a submission's author needs before anything is evaluated: a first agent, and a check of it."""
