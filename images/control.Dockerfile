# The control plane: Ray, this package, and the benchmarks. Built by `make images`; see docs/operate.md.
# Pin the base by its digest: --build-arg BASE=registry.example.com/python@sha256:...
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY images ./images
COPY orchestrator ./orchestrator
RUN images/install_control.sh /opt/orchestrator /source

FROM ${BASE}
# Ray and Python ask for the user's name, and for a home that can be written to.
RUN groupadd --gid 65532 orchestrator \
 && useradd --uid 65532 --gid 65532 --home-dir /home/orchestrator --create-home --shell /bin/bash orchestrator \
 # A login shell, which an operator of Ray may start, sets PATH anew.
 && echo 'PATH=/opt/orchestrator/bin:$PATH' > /etc/profile.d/orchestrator.sh
COPY --from=build /opt/orchestrator /opt/orchestrator
COPY LICENSE /opt/orchestrator/LICENSE
COPY examples/cartpole /opt/orchestrator/examples/cartpole
ENV PATH=/opt/orchestrator/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 65532:65532
WORKDIR /home/orchestrator
CMD ["orchestrator", "--help"]
