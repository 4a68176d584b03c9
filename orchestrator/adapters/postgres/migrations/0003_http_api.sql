-- Works with the code of schema 2.

-- Who may use the HTTP API. Of a token only its hash is kept: who reads this table can use none.
CREATE TABLE api_tokens (
    token_id     uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name         text NOT NULL,
    sha256       bytea NOT NULL UNIQUE CHECK (length(sha256) = 32),
    scopes       text[] NOT NULL CHECK (scopes <@ ARRAY['read', 'write'] AND cardinality(scopes) > 0),
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at   timestamptz,
    revoked_at   timestamptz
);

-- The name of a revoked token is free again; its row stays, for requests may refer to it.
CREATE UNIQUE INDEX api_tokens_in_use ON api_tokens (name) WHERE revoked_at IS NULL;

-- Which job an Idempotency-Key of a token stands for: written before the job, so that a request that is
-- repeated after a crash anywhere finds the id it has to insert.
CREATE TABLE idempotency_keys (
    token_id       uuid NOT NULL REFERENCES api_tokens ON DELETE CASCADE,
    key_sha256     bytea NOT NULL CHECK (length(key_sha256) = 32),
    request_sha256 bytea NOT NULL CHECK (length(request_sha256) = 32),
    job_id         bigint NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (token_id, key_sha256)
);

-- When a consumer last went over all jobs: a connection alone would also be there of a process that is frozen.
ALTER TABLE installation ADD COLUMN consumer_seen_at timestamptz;
