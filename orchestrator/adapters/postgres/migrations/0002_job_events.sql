-- Works with the code of schema 1.

-- What happened to a job, in the order of `number`; a gap says how much was left out of a job that flaps.

CREATE TABLE job_events (
    job_id bigint NOT NULL REFERENCES jobs ON DELETE CASCADE,
    number integer NOT NULL,
    at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    epoch  integer NOT NULL,
    status text NOT NULL,
    detail text,
    PRIMARY KEY (job_id, number)
);

-- Of jobs from before this table only the ends are known.
INSERT INTO job_events (job_id, number, at, epoch, status, detail)
SELECT job_id, 1, created_at, 0, 'QUEUED', 'waits in the queue' FROM jobs
UNION ALL
SELECT job_id, 2, coalesce(finished_at, running_at, claimed_at, created_at), epoch, status, detail
FROM jobs WHERE status <> 'QUEUED';

-- The process that asked for an ad-hoc job and renews `client_lease_expires_at`.
ALTER TABLE jobs ADD COLUMN client text;
