# Training and inference on NVIDIA GPUs; on a machine without one it runs on the CPU.
#   docker build -t vidgen .
#   docker run --gpus all -v /data:/data vidgen accelerate launch train_vae.py --config configs/vae/paper.yaml data.root=/data/UCF-101
# Not built by the project yet: the development machine has no Docker daemon, and the tag of the base image is unverified.
FROM pytorch/pytorch:2.13.0-cuda12.9-cudnn9-runtime

WORKDIR /workspace/vidgen
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY autoencoder autoencoder
COPY pipelines pipelines
COPY vidgen vidgen
# torch comes with the image; the constraint on it names the CPU build that the tests use.
RUN grep -v -i '^torch==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt -e '.[web,lora,loggers]'
COPY . .

CMD ["vidgen", "--help"]
