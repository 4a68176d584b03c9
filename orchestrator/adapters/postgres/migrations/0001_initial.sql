-- Postgres is the truth: Ray actors and queue rows may be lost, doubled or late; these tables decide.

CREATE TABLE installation (
    singleton       boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    installation_id uuid NOT NULL DEFAULT gen_random_uuid(),
    -- Keys seeds and session keys. Two random uuids are 244 random bits.
    secret          bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()),
    generation      integer NOT NULL DEFAULT 0,
    fingerprint     text NOT NULL DEFAULT '',
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp()
);

INSERT INTO installation DEFAULT VALUES;

CREATE TABLE jobs (
    job_id                  bigint PRIMARY KEY CHECK (job_id >= 0),
    message                 json NOT NULL,  -- jsonb refuses \u0000, which a stranger may send
    local                   boolean NOT NULL DEFAULT false,
    priority                integer NOT NULL DEFAULT 0,
    plan                    jsonb,
    status                  text NOT NULL CHECK (status IN
        ('QUEUED', 'STARTING', 'RUNNING', 'COMPLETED', 'FAILED', 'TIMEOUT', 'CANCELLED')),
    detail                  text,
    epoch                   integer NOT NULL DEFAULT 0,
    lease_holder            uuid,
    lease_expires_at        timestamptz,
    client_lease_expires_at timestamptz,
    deadline_at             timestamptz,
    cancel_requested_at     timestamptz,
    cancel_reason           text,
    container_id            uuid,
    outcomes_at_claim       integer NOT NULL DEFAULT 0,
    claims_without_progress integer NOT NULL DEFAULT 0,
    error                   text,
    created_at              timestamptz NOT NULL DEFAULT clock_timestamp(),
    claimed_at              timestamptz,
    running_at              timestamptz,
    finished_at             timestamptz,
    CHECK ((lease_holder IS NULL) = (lease_expires_at IS NULL)),
    -- A lease outlives neither the end of a job nor its return to the queue.
    CHECK (status IN ('STARTING', 'RUNNING') OR lease_holder IS NULL)
);

CREATE INDEX jobs_unfinished ON jobs (status, priority DESC, job_id)
    WHERE status IN ('QUEUED', 'STARTING', 'RUNNING');

CREATE TABLE claims (
    job_id     bigint NOT NULL REFERENCES jobs ON DELETE CASCADE,
    epoch      integer NOT NULL,
    holder     uuid NOT NULL,
    claimed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    outcomes   integer NOT NULL,
    ended_because text,
    handed_over boolean NOT NULL DEFAULT false,
    PRIMARY KEY (job_id, epoch)
);

CREATE TABLE containers (
    container_id uuid PRIMARY KEY,
    job_id       bigint NOT NULL REFERENCES jobs ON DELETE CASCADE,
    attempt      integer NOT NULL,
    handle       text,
    removing     boolean NOT NULL DEFAULT false,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX containers_of_a_job ON containers (job_id);

CREATE TABLE episodes (
    job_id              bigint NOT NULL REFERENCES jobs ON DELETE CASCADE,
    task_id             text NOT NULL,
    episode_id          integer NOT NULL,
    ordinal             integer NOT NULL,
    seed                bigint NOT NULL,
    policy_seed         bigint NOT NULL,
    run                 integer NOT NULL DEFAULT 0,
    finished            boolean NOT NULL DEFAULT false,
    epoch               integer,
    episode_return      double precision,
    steps               integer,
    success             boolean,
    terminated          boolean,
    truncated           boolean,
    fault               text,
    fault_detail        text,
    started_at          timestamptz,
    ended_at            timestamptz,
    action_trace        bytea,
    action_trace_sha256 text,
    metrics             jsonb,
    PRIMARY KEY (job_id, task_id, episode_id),
    CHECK (NOT finished OR (episode_return IS NOT NULL AND steps IS NOT NULL AND success IS NOT NULL
        AND epoch IS NOT NULL AND run > 0 AND action_trace_sha256 IS NOT NULL)),
    CHECK (fault IS NULL OR NOT success)
);

CREATE INDEX episodes_missing ON episodes (job_id, ordinal) WHERE NOT finished;

CREATE TABLE episode_parts (
    job_id     bigint NOT NULL,
    task_id    text NOT NULL,
    episode_id integer NOT NULL,
    run        integer NOT NULL,
    part       integer NOT NULL,
    payload    bytea NOT NULL,
    PRIMARY KEY (job_id, task_id, episode_id, run, part),
    FOREIGN KEY (job_id, task_id, episode_id) REFERENCES episodes ON DELETE CASCADE
);

CREATE TABLE results (
    job_id     bigint PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    message    json NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The job that an add_job row names, or NULL: payloads come from strangers.
CREATE FUNCTION orchestrator_payload_job_id(payload bytea) RETURNS bigint
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN (convert_from(payload, 'UTF8')::json ->> 'job_id')::bigint;
EXCEPTION WHEN others THEN
    RETURN NULL;
END $$;
