"""The llama.cpp HTTP server from the `xllamacpp` wheel, on one GGUF file: a real backend without a compiler.

It listens on 127.0.0.1 only and stops on SIGTERM or SIGINT. Port 0 takes a free port; the first line of its output
names the address in use.
"""

import argparse
import os
import signal
from pathlib import Path

try:
    import xllamacpp  # type: ignore[import-untyped]
except ImportError as exc:
    raise SystemExit("The demo backend needs the package xllamacpp; `make run` installs it.") from exc

MODEL = Path(__file__).with_name("tiny-think.gguf")
ERRORS_ONLY = 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve one GGUF file with the llama.cpp server.")
    parser.add_argument("--port", type=int, default=8081, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="a GGUF file (default: %(default)s)")
    parser.add_argument("--name", default="tiny-think", help="the name clients ask for (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=2048, help="window of all slots together, in tokens")
    parser.add_argument("--slots", type=int, default=2, help="requests served at once (default: %(default)s)")
    parser.add_argument("--embeddings", action="store_true", help="embeddings too, the mean over all tokens")
    return parser.parse_args()


def server_params(args: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = str(args.model)
    params.model_alias = {args.name}
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_ctx = args.ctx
    params.n_parallel = args.slots
    params.n_predict = 512
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.use_jinja = True  # without it the server refuses tools
    params.fit_params = False
    params.ui = False
    params.embedding = args.embeddings
    if args.embeddings:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.verbosity = ERRORS_ONLY
    return params


def stop(*_: object) -> None:
    # The server's own threads keep an ordinary exit waiting.
    os._exit(0)


def main() -> None:
    args = parse_args()
    if not args.model.is_file():
        raise SystemExit(f"There is no model file {args.model}.")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        server = xllamacpp.Server(server_params(args))
    except RuntimeError as exc:
        raise SystemExit(f"The llama.cpp server did not start: {exc}") from None
    print("listening on", server.listening_address, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
