# mpo in a container.
#
#   docker build -t mpo .                                                     for a CPU
#   docker build -t mpo --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -it -v "$PWD:/work" mpo mpo init
#   docker run --rm -it --gpus all --ipc host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" mpo mpo train recipe.yaml
#
# TORCH_INDEX is where torch comes from; its CUDA is to be one that the driver of the host can run. EXTRAS are those of
# pyproject.toml. What a run writes into /work belongs to root unless `docker run --user "$(id -u):$(id -g)"` says otherwise.

ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=plots

# CUDA's images have no Python of their own; gcc is for torch.compile and Triton.
# Versions are those of the base image's distribution, which removes old ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev git \
    && { command -v python3 >/dev/null || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/mpo
ENV PATH=/opt/mpo/bin:$PATH HF_HOME=/cache PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /src
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep -E '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY mpo ./mpo
COPY recipes ./recipes
RUN pip install -c constraints.txt ".[${EXTRAS}]" && mkdir -p /cache && chmod 1777 /cache

WORKDIR /work
CMD ["mpo", "--help"]
