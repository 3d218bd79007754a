# An image that trains on a GPU of its host or on the CPU, with DeepSpeed, decord and mmcv:
#     docker build -t tats .
#     docker run --rm --gpus all --shm-size 8g -v /data:/data -v "$PWD/output:/tats/output" tats \
#         python run_mae_pretraining.py --data_path /data/train.csv --output_dir output/run
# --gpus all needs NVIDIA's container toolkit; --shm-size is for the loader's processes.
# Built with buildah on another base image, never with Docker or on a GPU (docs/LOG.md).
FROM python:3.13-slim
# libgl1, libglib2.0-0: OpenCV. g++: --compile, and the kernels that DeepSpeed builds at first use. make: make demo
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libgl1 libglib2.0-0 make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /tats
COPY requirements.txt requirements-extra.txt constraints.txt ./
RUN python -m pip install --no-cache-dir -r requirements.txt -r requirements-extra.txt -c constraints.txt
COPY . .
ENV PYTHON=python
CMD ["python", "run_mae_pretraining.py", "--help"]
