# localmotion on a CPU, with software OpenGL (EGL) for pictures of MuJoCo. From the root of a checkout:
#   docker build -f docker/cpu.Dockerfile -t localmotion:cpu .
#   docker run --rm -v "$PWD/runs:/runs" localmotion:cpu demo --run /runs/demo
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends libegl1 libgles2 libgl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*
ENV MUJOCO_GL=egl PIP_NO_CACHE_DIR=1
RUN pip install --index-url https://download.pytorch.org/whl/cpu "torch>=2.8,<3"
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install "/source[dmc,metaworld,report,hub]"
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["localmotion"]
CMD ["info"]
