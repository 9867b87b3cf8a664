"""moto behind the middleware, as a process of its own: python -m tests.cloud.server [HOST [PORT]]; its first line is its address."""

import os
import sys
import threading

# moto looks at these when it is imported.
os.environ["MOTO_ENABLE_AMI_VALIDATION"] = "true"
os.environ["MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION"] = "true"

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from tests.cloud.middleware import Middleware


class _Quiet(MotoRequestHandler):  # type: ignore[misc]
    def log(self, *_: object) -> None:
        """Nothing: the log of calls is the middleware's."""


def main(host: str = "127.0.0.1", port: str = "0") -> None:
    """Serve until standard input ends, which it does when whoever started this is gone."""
    application = Middleware(DomainDispatcherApplication(create_backend_app))
    server = make_server(host, int(port), application, threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://{host}:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
