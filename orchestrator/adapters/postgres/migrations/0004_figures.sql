-- Works with the code of schema 3.

-- The jobs that ended since somebody last looked.
CREATE INDEX jobs_ended ON jobs (finished_at) WHERE finished_at IS NOT NULL;
