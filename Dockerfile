# edgemix on the CPU, without the exporter. This file has not been built yet: it was written where there is no Docker.
#
#   docker build -t edgemix .
#   docker run --rm -v "$PWD/experts:/bundle:ro" edgemix generate /bundle "The capital of France"
FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY edgemix edgemix
COPY export export
COPY runtime runtime
RUN python -m venv /opt/edgemix \
    && /opt/edgemix/bin/pip install --no-cache-dir -c constraints.txt ".[cpu,constrained]"

FROM python:3.11-slim
COPY --from=build /opt/edgemix /opt/edgemix
RUN useradd --create-home --uid 1000 edgemix
ENV PATH=/opt/edgemix/bin:$PATH PYTHONUNBUFFERED=1
USER edgemix
WORKDIR /home/edgemix
# `edgemix doctor` exits with 0 also where bundles cannot run: its document says whether they can.
HEALTHCHECK --interval=60s --timeout=30s --start-period=10s \
    CMD edgemix doctor --json | python -c "import json, sys; sys.exit(not json.load(sys.stdin)['can_run'])"
ENTRYPOINT ["edgemix"]
CMD ["--help"]
