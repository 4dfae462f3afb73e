# localmotion on an NVIDIA GPU, with hardware OpenGL (EGL) for pictures of MuJoCo. Needs the NVIDIA Container Toolkit.
#   docker build -f docker/cuda.Dockerfile -t localmotion:cuda .
#   docker run --rm --gpus all -v "$PWD/runs:/runs" localmotion:cuda info
FROM python:3.11-slim-bookworm
# libglvnd's EGL finds NVIDIA's driver, which the toolkit mounts, by this file.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libegl1 libgles2 libgl1 \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /usr/share/glvnd/egl_vendor.d \
    && echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "libEGL_nvidia.so.0"}}' \
       > /usr/share/glvnd/egl_vendor.d/10_nvidia.json
ENV MUJOCO_GL=egl PIP_NO_CACHE_DIR=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
RUN pip install "torch>=2.8,<3"
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install "/source[dmc,metaworld,report,hub]"
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["localmotion"]
CMD ["info"]
