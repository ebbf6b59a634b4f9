"""A WSGI application; the environment's DELAY is how long a request takes, in seconds."""
import os
import time

delay = float(os.environ.get("DELAY", 0))


def app(environ, start_response):
    time.sleep(delay)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"hello\n"]
