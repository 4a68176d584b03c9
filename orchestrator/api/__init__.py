"""The HTTP API: reads and writes Postgres through the client, and knows nothing of actors."""
