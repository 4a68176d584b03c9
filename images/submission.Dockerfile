# The base of submissions' pods. Runs under a read-only root, as a user without a right; nothing is installed into it
# later, by no package manager of the system. Built by `make images`; see docs/operate.md.
# Pin the base by its digest: --build-arg BASE=registry.example.com/python@sha256:...
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
# `TORCH=torch==2.9.0+cpu`, say, with PIP_EXTRA_INDEX_URL naming an index that has it.
ARG TORCH=
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /source
COPY images ./images
COPY orchestrator/__init__.py ./orchestrator/__init__.py
COPY orchestrator/submission ./orchestrator/submission
RUN images/install_submission.sh /opt/submission /source

FROM ${BASE}
RUN groupadd --gid 65532 submission \
 && useradd --uid 65532 --gid 65532 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin submission \
 && mkdir --mode=0777 /work
COPY --from=build /opt/submission /opt/submission
COPY LICENSE /opt/submission/LICENSE
ENV PATH=/opt/submission/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
USER 65532:65532
WORKDIR /work
CMD ["python", "-m", "orchestrator.submission.host", "--help"]
