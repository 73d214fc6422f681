# GSPO with everything that training needs:
#   docker build -t gspo .
#   docker run --rm --gpus all --ipc=host -v "$PWD/outputs:/gspo/outputs" gspo python train.py --config configs/quick.yaml
# Build arguments: BASE, another image (ubuntu:24.04 for a machine without a GPU); EXTRAS, more packages, as in
#   docker build -t gspo --build-arg EXTRAS="peft==0.21.2 wandb pyarrow datasets" .
# PyTorch's wheels bring CUDA's libraries; of the host they need the driver and its container toolkit.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# g++: the kernels for CPUs, and Triton's launchers. python3-dev: Triton includes Python.h.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ make \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/gspo/bin:${PATH} \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python3 -m venv /opt/gspo

WORKDIR /gspo
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
ARG EXTRAS=""
RUN if [ -n "${EXTRAS}" ]; then pip install --no-cache-dir ${EXTRAS}; fi

COPY . .
RUN pip install --no-cache-dir --no-deps --editable .

# What a run writes goes to /gspo/outputs; compiled kernels to the cache, which a volume keeps: -v gspo-cache:/root/.cache
VOLUME /gspo/outputs
CMD ["python", "train.py", "--help"]
