# syntax=docker/dockerfile:1
# Tandem in two images that differ in torch and what only GPUs need:
#
#   docker build --target cpu  -t REGISTRY/tandem:0.1.0 .
#   docker build --target cuda -t REGISTRY/tandem:0.1.0-cuda .
#
# Neither runs as root; both work with a read-only root (writable: /tmp, /home/tandem, /dev/shm, and /models for weights). Every
# version is that of requirements.lock. bash and wget are there for KubeRay's own probes.

ARG PYTHON=3.11-slim-bookworm

# ---- the wheel -------------------------------------------------------------------------------------------------------
FROM python:${PYTHON} AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir "setuptools==84.2.1" "wheel==0.48.0" \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# ---- what both images have -------------------------------------------------------------------------------------------
FROM python:${PYTHON} AS runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 tandem \
    && useradd --uid 1000 --gid tandem --create-home --home-dir /home/tandem tandem \
    && mkdir /models \
    && chown tandem:tandem /models
ENV HOME=/home/tandem \
    HF_HOME=/models \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    TRITON_CACHE_DIR=/tmp/triton
COPY requirements.lock /etc/tandem/requirements.lock
WORKDIR /home/tandem
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
    CMD ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/ready"]

# ---- cpu -------------------------------------------------------------------------------------------------------------
FROM runtime AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# torch first, in a layer of its own: it is the largest part and changes least often
RUN pip install --no-cache-dir --constraint /etc/tandem/requirements.lock --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /etc/tandem/requirements.lock "$(echo /wheels/*.whl)[otel]"
USER 1000:1000
CMD ["tandem", "serve"]

# ---- cuda ------------------------------------------------------------------------------------------------------------
# The CUDA libraries come with torch's own packages; the driver comes from the host (NVIDIA container toolkit). Triton builds
# small C stubs where it runs, hence the compiler.
FROM runtime AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir --constraint /etc/tandem/requirements.lock torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /etc/tandem/requirements.lock "$(echo /wheels/*.whl)[gpu,otel]"
USER 1000:1000
CMD ["tandem", "serve"]
