# docker build -t llamavid .                        for CPUs
# docker build -t llamavid --build-arg EXTRA=tpu .  for a TPU host, run with --privileged --net=host; EXTRA=cuda for NVIDIA
# docker build -t llamavid-serve --build-arg EXTRA=serve .   for the server: --entrypoint llamavid-serve; serve,tpu on a TPU
FROM python:3.12-slim
ARG EXTRA=""
WORKDIR /llamavid
COPY . .
RUN pip install --no-cache-dir --constraint requirements.lock ".${EXTRA:+[$EXTRA]}"
WORKDIR /data
ENTRYPOINT ["llamavid"]
