# beit_fast with the versions of constraints.txt on a plain CUDA image.
#
#     docker build -t beit_fast .
#     docker run --rm --gpus all --ipc=host -v IMAGES:/images:ro -v RUNS:/work/runs beit_fast \
#         torchrun --nproc_per_node=8 --no-python beit-fast pretrain small --data.path /images \
#         --data.batch_size 128 --run.accumulate 1 --tokenizer_training.data.batch_size 8
#
# Not NVIDIA's PyTorch image: its torch is a build between releases, so that none of the versions
# that were tested would be in it. torch's wheel brings CUDA, cuDNN and NCCL of its own; what the
# image below adds is the check that the driver is new enough for them, at the start and not at the
# first kernel. Not built by us yet: there was no Docker at hand.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Triton compiles a launcher for every kernel with gcc and Python's headers, torch.compile on a CPU
# takes g++. git: a checkpoint's manifest names the commit where there is one.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ gcc git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

WORKDIR /opt/beit_fast
COPY constraints.txt setup.py pyproject.toml README.md LICENSE beit_fast_main.py ./
COPY beit_fast/ beit_fast/
COPY kernels/ kernels/
COPY bench/ bench/
RUN pip install --no-cache-dir -c constraints.txt -e .

# What runs write belongs to no root: --user "$(id -u)" makes it yours, --run.output says where.
RUN useradd --create-home --uid 2000 beit && install -d -o beit -m 1777 /work /work/runs
USER beit
WORKDIR /work
# Compiled kernels, for whatever user. torch 2.11 asks for the name of its user when it compiles, and
# a number given to --user has none: then it is this one.
ENV TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor USER=beit
CMD ["beit-fast", "--help"]
