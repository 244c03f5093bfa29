# nemo_emmett on top of an image that brings torch for its GPUs.
#   docker build -t nemo_emmett .
#   docker run --rm --gpus all --ipc=host nemo_emmett doctor
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends ffmpeg libsndfile1 \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/nemo_emmett
WORKDIR /opt/nemo_emmett

# The image's torch is built for its drivers and libraries: the constraint keeps pip from replacing it. NVIDIA's images
# have a constraints file of their own as well (PIP_CONSTRAINT), which stays in force.
RUN python -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/image.txt \
    && python -m pip install --no-cache-dir -c /tmp/image.txt '.[synthesis,langid,charts]' \
    && rm /tmp/image.txt

RUN useradd --create-home emmett
USER emmett
WORKDIR /home/emmett

# The check: fails the build if the package cannot be used as it was installed.
RUN nemo-emmett doctor

ENTRYPOINT ["nemo-emmett"]
CMD ["doctor"]
