# The proxy in a container: docs/deploy.md. tests/test_image.py carries these steps out without a container engine.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
COPY *.py pyproject.toml README.md LICENSE /src/
RUN python -m venv /opt/venv
RUN /opt/venv/bin/python -m pip install --no-cache-dir '/src[pdf,postgres]'

FROM python:${PYTHON}-slim
COPY --from=build /opt/venv /opt/venv
RUN mkdir /data && chown 65532:65532 /data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/data/cache \
    RESPONSES_PROXY_SERVER__HOST=0.0.0.0 \
    RESPONSES_PROXY_SERVER__PORT=8080 \
    RESPONSES_PROXY_STORE__PATH=/data/responses.db
# A number, because Kubernetes cannot tell of a name that it is not root.
USER 65532:65532
# SQLite puts large temporary files here where there is no writable /tmp.
WORKDIR /data
VOLUME /data
EXPOSE 8080
# There is no curl in the image; http.client, unlike urllib, does not ask the proxy of the environment.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['RESPONSES_PROXY_SERVER__PORT']), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["responses-proxy"]
