# maskfeat with its recipes, on CUDA, as a user without root:
#   docker build -t maskfeat .
#   docker run --rm --gpus all --ipc host -v "$PWD:/workspace" maskfeat train --cfg RECIPE KEY VALUE ...
# --ipc host: data workers pass batches on in shared memory, of which a container has 64 MB by default.

# PyTorch's wheels bring cuBLAS, cuDNN and NCCL; the image has to fit the driver of the host (CUDA 13: 580 or later).
# For another CUDA version give --build-arg CUDA_IMAGE, and PIP_EXTRA_INDEX_URL with the wheels that PyTorch has for it.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${CUDA_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=""
# Extras of setup.py, such as slurm or slurm,torchcodec.
ARG EXTRAS=""
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/maskfeat
ENV PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY configs configs
COPY maskfeat maskfeat
RUN /opt/maskfeat/bin/pip wheel --no-deps --wheel-dir dist . \
    && /opt/maskfeat/bin/pip install "$(echo dist/maskfeat-*.whl)${EXTRAS:+[$EXTRAS]}"

FROM ${CUDA_IMAGE}
# A compiler and Python's headers for TRAIN.COMPILE and Triton.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
# Files that runs write to mounted folders belong to this user; --build-arg USER_ID="$(id -u)" makes them yours.
ARG USER_ID=1000
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "$USER_ID" maskfeat \
    && install --directory --owner maskfeat /workspace
COPY --from=build /opt/maskfeat /opt/maskfeat
ENV PATH=/opt/maskfeat/bin:$PATH
USER maskfeat
WORKDIR /workspace
ENTRYPOINT ["maskfeat"]
CMD ["--help"]
