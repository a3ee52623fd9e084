# CPU or CUDA: the base image has neither, torch's wheel brings what it needs. Not built by the tests.
#   docker build -t recbole-mllm .
#   docker run --rm -it -v "$PWD:/work" recbole-mllm                  # the demo; its results/ in your folder
#   docker run --rm -it --gpus all -v "$PWD:/work" recbole-mllm benchmark --dataset mine --models quick,MLLMMSR
# Another build of torch, such as one for the CPU alone: --build-arg PIP_EXTRA_INDEX_URL=…
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=server,report
COPY . /opt/recbole_mllm
RUN cd /opt/recbole_mllm && pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

WORKDIR /work
ENTRYPOINT ["recbole-mllm"]
